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
from . import _ranks as ranks
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

    Random = Callable[..., np.random.Generator]
    Back = Callable[[torch.Tensor], Pair]

RULES = ("sum", "mean", "ties", "dare", "della", "tsv", "iso")
DENSITY_HELP = "share of each change's elements that is kept"
DENSE_RANK_HELP = (
    "rank of every module; by default the sum of the ranks there (the merged change has full rank)"
)
WINDOW = 0.15
"""Distance of DELLA's largest from its smallest probability of keeping an element."""


NORMALIZE_HELP = "divide by the weights that agree; without, the sum stays"


@dataclass(frozen=True, kw_only=True)
class DenseOptions(common.MergeOptions):
    """What the user chooses for rules that act on whole changes of weights, beside their density."""

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
    mass: float | None = None,
    consume: bool = False,
) -> torch.Tensor:
    """Merge matrices by a rule.

    Args:
        rule: ``sum``: sum_i w_i d_i; ``mean``: that divided by the sum of the weights; ``ties``: every change cut to
            its largest elements, signs elected, what agrees averaged; ``dare``: elements kept at random and divided by
            the density, then summed; ``della``: kept at random, larger ones more, divided by their probability, signs
            elected; ``tsv``: singular vectors made orthogonal across changes; ``iso``: the sum with all its singular
            values equal.
        changes: of one shape and floating type.
        weights: one each.
        rng: gives the stream of a purpose.
        density: of ``ties``, ``dare`` and ``della``.
        normalize: whether ``ties`` and ``della`` divide by the weights that agree.
        mass: the sum of the weights that ``mean`` divides by, with those of adapters that lack the module.
        consume: whether the changes may be overwritten.
    """
    from ...linalg import merge_rules, task_singular

    if rule in ("sum", "mean"):
        total = merge_rules.weighted_sum(changes, weights)
        if rule == "sum":
            return total
        divisor = sum(weights) if mass is None else mass
        if not divisor:
            raise UsageError("--weights add up to 0, so no mean can be taken")
        return total / divisor
    if rule == "ties":
        trimmed = [trim(c if consume else c.clone(), density) for c in changes]
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
    """Only the largest floor(density * elements), ties by position; overwrites the change where it is contiguous."""
    from ...linalg.selection import Taking, kth_largest

    count = change.numel()
    cut = kth_largest(lambda: iter([change]), count, int(density * count + 1e-9))
    return Taking(cut).trim_(change.contiguous())


def dense(
    rule: str, *, rank: int, rng: Random, **options: Any
) -> Callable[[list[Pair], list[float]], tuple[Pair, dict[str, object]]]:
    """A merge that forms the changes B A, applies a rule to them and truncates the result."""

    def merged(pairs: list[Pair], weights: list[float]) -> tuple[Pair, dict[str, object]]:
        from ...linalg.lowrank import truncate

        # Elements are chosen and truncated, which loses far more than float32 rounds away.
        changes = [up.float() @ down.float() for down, up in pairs]
        kept = truncate(apply(rule, changes, weights, rng=rng, consume=True, **options), rank)
        up, down = kept.balanced()
        return (down, up), {"truncation_error": kept.relative_error}

    return merged


def plan_dense(adapters: Sequence[Adapter], options: DenseOptions) -> Draft:
    """The plan of a rule on whole changes: every module at the chosen rank.

    A unit also holds the changes, and the decomposition of the result.

    Raises:
        UsageError: an option out of range.
    """
    chosen: Any = options
    params = {key: getattr(chosen, key) for key in ("density", "normalize") if hasattr(chosen, key)}
    check_density(params["density"])
    count = len(adapters)
    modules = [module for adapter in adapters for module in adapter.modules.values()]
    # Copies of the factors that take as much memory as the dense changes of the widest module do.
    factors = min((module.down.count + module.up.count for module in modules), default=1)
    dense_numbers = max((module.inputs * module.outputs for module in modules), default=1)
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.sum_rank(options.rank),
        params=params,
        exactness=Exactness("approximate", "the merged change is truncated to a lower rank"),
        memory=12 + (count + 4) * -(-dense_numbers // factors),
    )


def transform_dense(rule: str) -> Callable[[Work], dict[str, object]]:
    """The transform of a method that applies a rule to one module's whole changes and truncates."""

    @saved.beside
    def transform(work: Work) -> dict[str, object]:
        params = work.params
        chosen = {key: params[key] for key in ("density", "normalize") if key in params}
        merged = dense(rule, rank=params["rank"], rng=_streams(work), **chosen)
        return unit.merge_each(work, merged)

    return transform


def plan_within(adapters: Sequence[Adapter], options: Any, *, memory: int = 12) -> Draft:
    """The plan of a method that applies ``--rule`` to coordinates of the changes in a basis that loses nothing.

    Raises:
        UsageError: an option out of range.
    """
    check_density(options.density)
    exactness = Exactness("approximate", f"the rule {options.rule} is no sum")
    if options.rule == "sum" and options.rank is None:
        exactness = Exactness("exact", "sums in the common basis are sums of the changes")
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.sum_rank(options.rank),
        params={"rule": options.rule, "density": options.density},
        exactness=exactness,
        memory=memory,
    )


def transform_within(
    work: Work, coordinates: Callable[[list[Pair]], tuple[list[torch.Tensor], Back]]
) -> dict[str, object]:
    """Apply ``--rule`` to one module's changes in a basis.

    Args:
        coordinates: from the adapters' factors to matrices, and from a merged matrix to factors of at most the
            planned rank.
    """
    params = work.params
    mass = params["mass"]

    def merged(pairs: list[Pair], weights: list[float]) -> Pair:
        matrices, back = coordinates(pairs)
        rng = _streams(work)
        return back(
            apply(params["rule"], matrices, weights, rng=rng, density=params["density"], mass=mass)
        )

    return unit.merge_each(work, merged)


def _streams(work: Work) -> Random:
    """The random streams of a module."""
    return lambda *path: work.rng(work.params["module"], *path)


def _drop(change: torch.Tensor, likely: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Elements kept with their probability and divided by it, so that the expectation is the change."""
    import numpy as np
    import torch

    from ...linalg.merge_rules import drawn

    kind: Any = np.float64 if change.dtype == torch.float64 else np.float32
    kept = drawn(torch.from_numpy(rng.random(tuple(change.shape), dtype=kind)), likely)
    return kept.mul_(change).div_(likely.clamp_min(1e-12))
