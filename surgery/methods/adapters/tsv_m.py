"""TSV-Merge on adapters: singular vectors made orthogonal across tasks, then added.

    w_i B_i A_i = U_i S_i V_iᵀ,   dW = polar([U_1 ... U_T]) diag(S_1 ... S_T) polar([V_1 ... V_T])ᵀ

arXiv:2412.00081, in core space, where it is what it is on the whole changes. Of each adapter all ranks are kept (the
paper keeps 1/T of full rank, which is more than an adapter has); ``--per-task`` keeps fewer.

Deviation from the published code, which is wrong on changes of low rank: singular values of zero are left out before
the vectors are stacked, and the polar factor is taken on the span of what is there. So identical tasks give that
task, and orthogonal tasks give their sum. ``--rank`` truncates the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

INFO = MethodInfo(
    summary="make the adapters' singular vectors orthogonal to each other, then add",
    paper="arXiv:2412.00081",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    per_task: int | None = option(None, "singular triplets of each adapter; by default all")
    rank: int | None = option(None, ranks.SUM_HELP)


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks, or the chosen rank."""
    if options.per_task is not None and options.per_task < 1:
        raise UsageError(f"--per-task {options.per_task} should be at least 1")
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.sum_rank(options.rank),
        params={"per_task": options.per_task},
        exactness=Exactness("approximate", "directions that tasks share are turned apart"),
        memory=12,
    )


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Merge one module."""
    from ...linalg.core_space import core_space
    from ...linalg.task_singular import triplets, tsv_merge

    params = work.params

    def merged(pairs: list[Pair], weights: list[float]) -> Pair:
        space = core_space(pairs)
        kept = params["per_task"] or max(space.left.shape[1], space.right.shape[0])
        parts = [
            triplets(core * weight, kept) for core, weight in zip(space.cores, weights, strict=True)
        ]
        found = tsv_merge(parts)
        core = space.cores[0].new_zeros(space.cores[0].shape) if found is None else found
        return space.factors(core, params["rank"])

    return unit.merge_each(work, merged)
