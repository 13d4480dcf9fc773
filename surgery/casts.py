"""What the one cast of a result to its stored type takes away from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PIECE = 1 << 16
"""Elements of a tensor that are measured at a time."""
SQUARES = (1e-20, 1e30)
"""Sums of squares that float32 takes without losing what matters to underflow or overflow."""


def relative_loss(tensor: torch.Tensor, cast: torch.Tensor) -> float | None:
    """Frobenius norm of what a cast changed over that of the tensor; None for a tensor of zeros.

    In pieces that stay in the processor's cache: norms of whole tensors take several times as long. What a cast of
    float32 to half precision takes away is exact in float32, and so are five digits of the sum of its squares.
    """
    import torch

    lost = size = 0.0
    flat, stored = tensor.reshape(-1), cast.reshape(-1)
    for whole, other in zip(torch.split(flat, PIECE), torch.split(stored, PIECE), strict=True):
        taken = _squares(whole, other) if whole.dtype == torch.float32 else None
        if taken is None or taken[0] < SQUARES[0] or taken[1] > SQUARES[1]:
            taken = _squares(whole.double(), other.double())
        lost += taken[0]
        size += taken[1]
    return (lost / size) ** 0.5 if size else None


def _squares(whole: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Squared norms of the difference and of the first."""
    difference = whole - other
    return float(difference.dot(difference)), float(whole.dot(whole))
