"""Changes whose elements are dropped at random: what DARE and DELLA share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import _blocks as reading

if TYPE_CHECKING:
    import torch

    from ...execute import Work


def merge(
    work: Work, probability: Callable[[torch.Tensor], torch.Tensor | float], *, divide: bool
) -> dict[str, object]:
    """Thin a unit's changes, rescale and merge them, and write the tensor.

    Args:
        probability: of keeping each element of a change; above 0.
        divide: whether what is kept is divided by its probability.
    """
    from ...linalg.merge_rules import elected, weighted_sum

    params, blocks = (
        work.params,
        reading.Blocks(work, based=True, once=work.params["rescale"] != "l1"),
    )
    count = len(params["weights"])

    def thin(block: reading.Block) -> list[torch.Tensor]:
        found = []
        for source, change in enumerate(block.tensors):
            likely = probability(change)
            kept = _kept(work, block, source, likely).to(change.dtype).mul_(change)
            found.append(kept.div_(likely) if divide else kept)
        return found

    factors = [1.0] * count
    if params["rescale"] == "l1":
        before, after = [0.0] * count, [0.0] * count
        for block in blocks:
            for source, (change, kept) in enumerate(zip(block.tensors, thin(block), strict=True)):
                before[source] += float(change.abs().sum(dtype=_float64()))
                after[source] += float(kept.abs().sum(dtype=_float64()))
        factors = [a / b if b else 1.0 for a, b in zip(before, after, strict=True)]
    weights = params["weights"]
    conflicts = 0
    for block in blocks:
        left = [change.mul_(f) for change, f in zip(thin(block), factors, strict=True)]
        if params["elect"]:
            found = elected(left, weights)
            conflicts += found.conflicts
            reading.put(work, block, found.merged, params["scale"])
        else:
            reading.put(work, block, weighted_sum(left, weights), params["scale"])
    return {"conflicts": conflicts / max(1, blocks.count)} if params["elect"] else {}


def _kept(
    work: Work, block: reading.Block, source: int, likely: torch.Tensor | float
) -> torch.Tensor:
    """The mask of one block of one source, ones and zeros: the same on every pass."""
    import numpy as np
    import torch

    from ...linalg.merge_rules import drawn

    generator = work.rng("drop", block.target.tensor, source, block.index)
    uniform = torch.from_numpy(generator.random(block.target.shape or (1,), dtype=np.float32))
    return drawn(uniform.reshape(block.target.shape), likely)


def _float64() -> torch.dtype:
    import torch

    return torch.float64
