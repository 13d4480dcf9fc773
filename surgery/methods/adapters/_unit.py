"""A module's unit in every merge of adapters: factors in, factors of the planned rank and their measures out.

Methods get factors with scales folded in, in float64. Modules that only some adapters have count as zero in the others,
or `_merge.weights_in` has shared out their weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ...adapters.output import Written, placed, read_factors

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Module
    from ...execute import Work
    from ...linalg.factor_stack import Stack
    from ...linalg.factors import Factors
    from ...linalg.gauge import Pair


@dataclass(frozen=True)
class Loaded:
    """What a unit's sources hold of its module.

    Attributes:
        module: of the first adapter that has it.
        factors: A [E, r, n] and B [E, m, r] of each adapter that has it, float64, scales folded in.
        weights: of those adapters.
        biases: scaled bias [m] of each of them, or None.
        sources: their positions.
        count: of all adapters, with or without the module.
    """

    module: Module
    factors: list[Factors]
    weights: list[float]
    biases: list[torch.Tensor | None]
    sources: list[int]
    count: int

    @cached_property
    def stack(self) -> Stack:
        """The factors side by side; its total is the weighted sum of the changes."""
        from ...linalg.factor_stack import Stack

        return Stack(self.factors, self.weights)


def load(work: Work, *, balanced: bool = True) -> Loaded:
    """Read a unit's factors, with the scales folded in as `read_factors` does."""
    name, adapters = work.params["module"], work.adapters
    held = [
        (index, adapter.modules[name])
        for index, adapter in enumerate(adapters)
        if name in adapter.modules
    ]
    factors, biases = [], []
    for index, module in held:
        layout = work.params["layouts"][index]
        factors.append(read_factors(work, module, source=index, layout=layout, balanced=balanced))
        bias = None
        if module.bias is not None:
            bias = work.read(placed(module.bias, index)).double() * module.scale
        biases.append(bias)
    weights = [work.params["weights"][index] for index, _ in held]
    positions = [index for index, _ in held]
    return Loaded(held[0][1], factors, weights, biases, positions, len(adapters))


def save(
    work: Work,
    loaded: Loaded,
    down_ERN: torch.Tensor,
    up_EMR: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> dict[str, object]:
    """Write merged factors, padded with zeros up to the planned rank, and measure them.

    Returns:
        ``error`` and ``stored_error``: the relative Frobenius distance of the change of weight from the weighted sum
        of the sources' changes, before and after the cast; ``effective_rank``; of the sources ``dead_ranks``, which
        contribute nothing; with several ``cosines``: [position, position, cosine of the angle between their changes]
        of each pair that has the module; and where an adapter lacks it ``contributors``, the positions of the others.
    """
    from ...adapters import packing
    from ...linalg import factors

    plan = Written(loaded.module, work.params["rank"], "", bias is not None)
    stack, experts, rank = loaded.stack, loaded.module.experts, down_ERN.shape[1]
    summed = down_ERN is stack.total[0] and up_EMR is stack.total[1]
    down_ERN, up_EMR = padded(down_ERN, plan.rank, 1), padded(up_EMR, plan.rank, 2)
    down = work.write(plan.down, packing.pack_down(down_ERN, plan.down.shape))
    up = work.write(plan.up, packing.pack_up(up_EMR, plan.up.shape))
    rounded = packing.unpack_down(down, experts), packing.unpack_up(up, experts)
    if bias is not None:
        work.write(plan.bias_region, bias)
    if summed:
        error, effective_rank = 0.0, stack.effective_rank()
        changed = any(work.casts.get(region.tensor) for region in (plan.down, plan.up))
        kept = rounded[0][:, :rank], rounded[1][:, :, :rank]
        stored_error = stack.rounding_error(kept) if changed else 0.0
    else:
        merged, stored = (down_ERN, up_EMR), (rounded[0].double(), rounded[1].double())
        error = factors.relative_error(merged, stack.total)
        effective_rank = factors.effective_rank(*merged)
        # Where the merge loses nothing, it has the sum's norm, and what the cast loses is all there is.
        stored_error = (
            factors.relative_error(stored, stack.total)
            if error > 1e-12
            else factors.rounding_error(merged, stored, stack.norm)
        )
    found: dict[str, object] = {
        "rank": rank,
        "error": error,
        "stored_error": stored_error,
        "effective_rank": effective_rank,
        "dead_ranks": stack.dead(),
    }
    if len(loaded.sources) > 1:
        angles = stack.cosines()
        found["cosines"] = [
            [loaded.sources[i], loaded.sources[j], angles[i][j]]
            for i, j in combinations(range(len(angles)), 2)
        ]
    if len(loaded.sources) < loaded.count:
        found["contributors"] = loaded.sources
    return found


def merge_each(
    work: Work,
    merged: Callable[[list[Pair], list[float]], Any],
    *,
    bias: Callable[[Loaded], torch.Tensor | None] | None = None,
    balanced: bool = True,
) -> dict[str, object]:
    """Merge every expert of a module (most have one) and write it.

    Args:
        merged: from factors A [r, n] and B [m, r] of each adapter that has the module, and their weights, to merged
            factors of at most the planned rank, or to these and metrics.
        bias: how biases are merged; by default their weighted sum.
        balanced: whether both factors take a share of the scale: see `read_factors`.
    """
    import torch

    loaded = load(work, balanced=balanced)
    found, metrics = [], []
    for expert in range(loaded.module.experts):
        pairs = [(down[expert], up[expert]) for down, up in loaded.factors]
        result = merged(pairs, loaded.weights)
        pair, measured = result if isinstance(result[1], dict) else (result, {})
        found.append(pair)
        metrics.append(measured)
    rank = max(down.shape[0] for down, _ in found)
    down_ERN = torch.stack([padded(down, rank, 0) for down, _ in found])
    up_EMR = torch.stack([padded(up, rank, 1) for _, up in found])
    own = metrics[0] if len(metrics) == 1 else {"experts": metrics} if any(metrics) else {}
    added = (bias or summed_bias)(loaded)
    return {**save(work, loaded, down_ERN, up_EMR, bias=added), **own}


def padded(factor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """A factor with zeros up to a rank."""
    import torch

    if factor.shape[dim] == size:
        return factor
    lacking = list(factor.shape)
    lacking[dim] = size - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(lacking)], dim=dim)


def summed_bias(loaded: Loaded) -> torch.Tensor | None:
    """The weighted sum of the biases, or None where no adapter has one."""
    found = None
    for bias, weight in zip(loaded.biases, loaded.weights, strict=True):
        if bias is not None:
            found = bias * weight if found is None else found + bias * weight
    return found
