"""Compress, then merge: shared subspaces of a rank first, and a rule on the coordinates in them.

    U_r: leading eigenvectors of sum_i dW_i dW_iᵀ,   V_r: of sum_i dW_iᵀ dW_i,   dW_i = B_i A_i
    M_i = U_rᵀ dW_i V_r   [r, r],   B A = U_r rule(M_1, ..., M_T) V_rᵀ

so the result has the rank by construction. arXiv:2606.03723 was seen in its abstract alone, which does not say how
the subspaces are chosen: ours are those of the higher-order SVD, computed in core space. For sums the truncation of
`svd` is optimal and this is not; its point is rules that are no sums. With a rank as large as the sum of the ranks it
is `core`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _rules as rules
from . import _saved as saved

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

INFO = MethodInfo(
    summary="shared subspaces of a rank first, then any rule on the coordinates in them",
    paper="arXiv:2606.03723",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    rule: str = option("sum", "how the coordinates are merged", choices=rules.RULES)
    rank: int | None = option(None, ranks.RANK_HELP)
    density: float = option(0.5, rules.DENSITY_HELP + ", for ties, dare and della")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the rank of the subspaces."""
    rules.check_density(options.density)
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.chosen_rank(options.rank, None),
        params={"rule": options.rule, "density": options.density},
        exactness=Exactness("approximate", "the changes are projected onto shared subspaces"),
        memory=12,
    )


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Merge one module's coordinates."""
    import torch

    from ...linalg.core_space import core_space

    rank = work.params["rank"]

    def coordinates(pairs: list[Pair]) -> tuple[list[torch.Tensor], rules.Back]:
        space = core_space(pairs)
        grams = [sum(m @ m.T for m in space.cores), sum(m.T @ m for m in space.cores)]
        left, right = (
            torch.linalg.eigh(torch.as_tensor(gram)).eigenvectors.flip(1)[:, :rank]
            for gram in grams
        )
        matrices = [left.T @ core @ right for core in space.cores]
        return matrices, lambda found: space.factors(left @ found @ right.T, rank)

    return rules.transform_within(work, coordinates)
