"""Experimental: TSV-Merge with weights by outliers and ranks by sparsity, after R-TSVM.

The formulas of arXiv:2502.06876 ("R-TSVM", later "RESM") could not be obtained. This is our working definition of the
two things its abstract names, and makes no claim to be the paper's:

    O_i = {|d| > mean + 3 std of |d|} among the elements d of dW_i;  omega_i = |dW_i on O_i| / mean over the adapters
    rho = share of |d| < 0.01 max|d|, mean over the adapters;  q = max(1, round(q_all (1 - rho) / mean(1 - rho)))
    dW = TSV-Merge of the leading q triplets of each dW_i, with singular values times omega_i

with the mean of 1 - rho over all modules. Without outliers and with equal sparsity everywhere it is `tsv-m`. Where no
adapter has outliers in a module, all weights are 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair
    from ...weights import Weights

INFO = MethodInfo(
    summary="experimental: tsv-m with weights by outliers and ranks by sparsity",
    paper="arXiv:2502.06876",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)
SMALL = 0.01
"""Part of the largest element below which one counts as zero."""


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    rank: int | None = option(None, ranks.SUM_HELP)


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks, or the chosen rank."""
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.sum_rank(options.rank),
        params={},
        exactness=Exactness("approximate", "tasks are weighted and turned apart"),
        memory=24,
    )


def decide_from_weights(
    model: Any, options: Options, statistics: Any, weights: Weights, seed: int
) -> dict[str, Any]:
    """The share of elements that count, by module, relative to the mean."""
    dense: dict[str, float] = {}
    for name, factors, _ in ranks.track_factors(weights, options):
        shares = [1 - sparsity(up[0] @ down[0]) for down, up in factors]
        dense[name] = sum(shares) / len(shares)
    mean = sum(dense.values()) / len(dense)
    return {"None": {name: share / mean if mean else 1.0 for name, share in dense.items()}}


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Merge one module."""
    from ...linalg.core_space import core_space
    from ...linalg.task_singular import triplets, tsv_merge

    params = work.params
    share = work.decision[params["module"]]

    def merged(pairs: list[Pair], weights: list[float]) -> tuple[Pair, dict[str, object]]:
        space = core_space(pairs)
        heavy = outlier_weights([up @ down for down, up in pairs])
        parts = []
        for (down, _), core, weight, factor in zip(pairs, space.cores, weights, heavy, strict=True):
            kept = max(1, round(min(len(down), min(core.shape)) * share))
            parts.append(triplets(core * (weight * factor), kept))
        found = tsv_merge(parts)
        core = space.cores[0].new_zeros(space.cores[0].shape) if found is None else found
        return space.factors(core, params["rank"]), {"outlier_weights": heavy}

    return unit.merge_each(work, merged)


def sparsity(change: torch.Tensor) -> float:
    """The share of elements that count as zero; 1 for a change of zero."""
    sizes = change.abs()
    top = float(sizes.max()) if sizes.numel() else 0.0
    return float((sizes < SMALL * top).double().mean()) if top else 1.0


def outlier_weights(changes: Sequence[torch.Tensor]) -> list[float]:
    """The norm of each change's outliers relative to their mean; 1 for all where there are none."""
    norms = []
    for change in changes:
        sizes = change.abs()
        limit = sizes.mean() + 3 * sizes.std(correction=0)
        norms.append(float(sizes[sizes > limit].norm()))
    mean = sum(norms) / len(norms)
    return [norm / mean for norm in norms] if mean else [1.0] * len(norms)
