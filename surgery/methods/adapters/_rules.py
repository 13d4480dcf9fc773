"""Rules that merge matrices of one shape, whatever space they are coordinates in, and the options they share.

A rule takes matrices [p, q] in float64 with their weights and gives one matrix. Where it draws at random, each matrix
has its own stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..base import Draft, Exactness, option
from . import _merge as common

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

    Random = Callable[..., np.random.Generator]

RULES = ("sum", "mean", "ties", "dare", "della", "tsv", "iso")
DENSITY_HELP = "share of each change's elements that is kept"
DENSE_RANK_HELP = (
    "rank of every module; by default the sum of the ranks there (the merged change has full rank)"
)
WINDOW = 0.15
"""Distance of DELLA's largest from its smallest probability of keeping an element."""


@dataclass(frozen=True, kw_only=True)
class DenseOptions(common.MergeOptions):
    """What the user chooses for rules that act on whole changes of weights."""

    rank: int | None = option(None, DENSE_RANK_HELP)


def check_density(density: float) -> None:
    """Refuse a share that is none.

    Raises:
        UsageError: not above 0 and at most 1.
    """
    if not 0 < density <= 1:
        raise UsageError(f"--density {density} should be above 0 and at most 1")


def apply(
    rule: str,
    changes: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    rng: Random,
    density: float = 1.0,
    normalize: bool = True,
) -> torch.Tensor:
    """Merge matrices by a rule.

    Args:
        rule: ``sum``: sum_i w_i d_i; ``mean``: that divided by the sum of the weights; ``ties``: every change cut to
        its
            largest elements, signs elected, what agrees averaged; ``dare``: elements kept at random and divided by the
            density, then summed; ``della``: kept at random, larger ones more, divided by their probability, signs
            elected; ``tsv``: singular vectors made orthogonal across changes; ``iso``: the sum with all its singular
            values equal.
        changes: of one shape, float64.
        weights: one each.
        rng: gives the stream of a purpose.
        density: of ``ties``, ``dare`` and ``della``.
        normalize: whether ``ties`` and ``della`` divide by the weights that agree.
    """
    from ...linalg import merge_rules, task_singular

    if rule in ("sum", "mean"):
        total = merge_rules.weighted_sum(changes, weights)
        mass = sum(weights) if rule == "mean" else 1.0
        if not mass:
            raise UsageError("--weights add up to 0, so no mean can be taken")
        return total / mass
    if rule == "ties":
        trimmed = [trim(change, density) for change in changes]
        return merge_rules.elected(trimmed, weights, normalize=normalize).merged
    if rule == "dare":
        kept = [_drop(c, c.new_full((), density), rng("dare", i)) for i, c in enumerate(changes)]
        return merge_rules.weighted_sum(kept, weights)
    if rule == "della":
        kept = []
        for index, change in enumerate(changes):
            window = min(WINDOW, 2 * density, 2 * (1 - density))
            likely = merge_rules.keep_probabilities(change, density, window)
            kept.append(_drop(change, likely, rng("della", index)))
        return merge_rules.elected(kept, weights, normalize=normalize).merged
    if rule == "tsv":
        whole = min(changes[0].shape)
        parts = [
            task_singular.triplets(change * weight, whole)
            for change, weight in zip(changes, weights, strict=True)
        ]
        found = task_singular.tsv_merge(parts)
        return changes[0].new_zeros(changes[0].shape) if found is None else found
    return task_singular.isotropic(merge_rules.weighted_sum(changes, weights))


def trim(change: torch.Tensor, density: float) -> torch.Tensor:
    """Only the largest floor(density * elements), ties by position."""
    from ...linalg.selection import Taking, kth_largest

    sizes = change.abs()
    cut = kth_largest(lambda: iter([sizes]), sizes.numel(), int(density * sizes.numel() + 1e-9))
    return change * Taking(cut).mask(sizes)


def dense(
    rule: str, *, rank: int, rng: Random, **options: Any
) -> Callable[[list[Pair], list[float]], tuple[Pair, dict[str, object]]]:
    """A merge that forms the changes B A, applies a rule to them and truncates the result."""

    def merged(pairs: list[Pair], weights: list[float]) -> tuple[Pair, dict[str, object]]:
        import torch

        changes = [up @ down for down, up in pairs]
        found = apply(rule, changes, weights, rng=rng, **options)
        u, s, vt = torch.linalg.svd(found, full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        size = float(torch.linalg.vector_norm(s))
        lost = float(torch.linalg.vector_norm(s[kept:])) / size if size else 0.0
        return (vt[:kept] * root[:, None], u[:, :kept] * root), {"truncation_error": lost}

    return merged


def plan_dense(
    adapters: Sequence[Adapter], options: DenseOptions, params: dict[str, object]
) -> Draft:
    """The plan of a rule on whole changes: a unit also holds them, and an SVD of the result."""
    count = len(adapters)
    modules = [module for adapter in adapters for module in adapter.modules.values()]
    # Copies of the factors that take as much memory as the dense changes of the widest module do.
    factors = min((module.down.count + module.up.count for module in modules), default=1)
    dense_numbers = max((module.inputs * module.outputs for module in modules), default=1)
    return common.plan_merge(
        adapters,
        options,
        rank=sum_rank(options.rank),
        params=params,
        exactness=Exactness("approximate", "the merged change is truncated to a lower rank"),
        memory=12 + (count + 4) * -(-dense_numbers // factors),
    )


def transform_dense(work: Work, rule: str) -> dict[str, object]:
    """Merge one module's changes by a rule and truncate."""
    params = work.params
    chosen = {key: params[key] for key in ("density", "normalize") if key in params}
    merged = dense(
        rule,
        rank=params["rank"],
        rng=lambda *path: work.rng(params["module"], *path),
        **chosen,
    )
    return common.merge_each(work, merged)


def sum_rank(rank: int | None) -> Callable[[list[Any]], int]:
    """The sum of a module's ranks, or the rank that the user chose.

    Raises:
        UsageError: below 1.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} should be at least 1")

    def found(modules: list[Any]) -> int:
        first = modules[0]
        total = sum(module.rank for module in modules)
        most: int = min(first.inputs, first.outputs, total if rank is None else rank)
        return most

    return found


def _drop(change: torch.Tensor, likely: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Elements kept with their probability and divided by it, so that the expectation is the change."""
    import torch

    drawn = torch.from_numpy(rng.random(tuple(change.shape)))
    return torch.where(drawn < likely, change / likely.clamp_min(1e-12), 0.0)
