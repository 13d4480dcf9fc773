"""How the factors of stacked experts lie in one tensor.

PEFT stores A as [E r, in], expert after expert, and B as [out, r E] with the expert running fastest. Other trainers
write B expert after expert like A; the two cannot be told apart by shape, so the user says which it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LAYOUTS = ("peft", "unsloth")
"""Expert layouts of the second factor."""


def unpack_down(down: torch.Tensor, experts: int) -> torch.Tensor:
    """A [E r, n...] as [E, r, n] (a convolution's kernel is flattened)."""
    return down.reshape(experts, down.shape[0] // experts, -1)


def unpack_up(up: torch.Tensor, experts: int, layout: str = "peft") -> torch.Tensor:
    """B [m, r E, 1...] as [E, m, r]."""
    flat = up.reshape(up.shape[0], -1)
    rank = flat.shape[1] // experts
    if layout == "unsloth":
        return flat.reshape(-1, experts, rank).permute(1, 0, 2)
    return flat.reshape(-1, rank, experts).permute(2, 0, 1)


def pack_down(down_ERN: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """[E, r, n] in a stored shape [E r, n...]."""
    return down_ERN.reshape(shape)


def pack_up(up_EMR: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """[E, m, r] in a stored shape [m, r E, 1...], PEFT's layout."""
    return up_EMR.permute(1, 2, 0).reshape(shape)
