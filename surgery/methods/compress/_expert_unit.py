"""A unit of methods that compress a mixture's experts together: what it reads of a layer, how it writes the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from ...architectures.base import PROJECTIONS
from ...architectures.linears import expert_input
from ...checkpoint.region import Region
from .._mixture import mixture
from . import _expert_form as form_of_experts

if TYPE_CHECKING:
    import torch

    from ...execute import Work


class Found(Protocol):
    """What a method makes of one projection of all experts of a layer."""

    def weight(self, expert: int) -> torch.Tensor:
        """The matrix [out, in] an expert is left with."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the shared form stores, by leaf name."""


def matrices(work: Work, part: str) -> list[torch.Tensor]:
    """One projection [out, in] of every expert of the unit's layer, float32."""
    experts = mixture(work.model.layers[work.layer])
    return [work.read(experts.region(expert, part)) for expert in range(experts.count)]


def grams(work: Work, part: str) -> list[torch.Tensor | None] | None:
    """The Gram matrix of every expert's inputs of one projection; None where the run has no text.

    Gate and up all have the mixture's. An expert that no token chose has None for down.
    """
    if work.decision is None:
        return None
    from ...calibration.gram_folder import Grams

    folder = Grams.open(work.statistics)
    count = mixture(work.model.layers[work.layer]).count
    if part != "down":
        gram, _ = folder.read(work.layer, expert_input())
        return [gram] * count
    found: list[torch.Tensor | None] = []
    for expert in range(count):
        gram, rows = folder.read(work.layer, expert_input(expert))
        found.append(gram if rows else None)
    return found


def write_experts(
    work: Work,
    found: Mapping[str, Found],
    originals: Callable[[str, int], torch.Tensor] | None = None,
) -> dict[str, object]:
    """Write the experts in the unit's form; what is not in ``found`` stays as it is.

    Args:
        originals: what the error is measured against; the stored matrices if None (not right where neurons were
            moved).

    Returns:
        ``error``: relative Frobenius distance from the originals by projection.
    """
    import torch

    experts = mixture(work.model.layers[work.layer])
    shared = work.params["shared"]
    errors: dict[str, float] = {}
    for part in PROJECTIONS:
        made = found.get(part)
        lost = total = 0.0
        for expert in range(experts.count):
            region = experts.region(expert, part)
            if made is None:
                if not shared:
                    work.write(region, work.read(region))
                continue
            before = originals(part, expert) if originals is not None else work.read(region)
            after = made.weight(expert)
            lost += float(torch.linalg.vector_norm(after - before.double()) ** 2)
            total += float(torch.linalg.vector_norm(before, dtype=torch.float64) ** 2)
            if not shared:
                work.write(region, after)
        if made is not None:
            errors[part] = (lost / total) ** 0.5 if total else 0.0
            if shared:
                for leaf, tensor in made.tensors().items():
                    name = f"{form_of_experts.module(experts, part)}.{leaf}"
                    work.write(Region(name, tuple(tensor.shape)), tensor)
    return {"error": errors}
