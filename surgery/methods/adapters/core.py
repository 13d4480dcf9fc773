"""Core space: any rule on the small matrices that the adapters' changes are in a common basis.

    B_i A_i = U M_i V   without loss, with orthonormal U and V that span all B_i and all A_i
    B A = U rule(M_1, ..., M_T) V

arXiv:2509.17786. A rule costs as much as matrices of the size of the sum of the ranks. ``sum`` and ``mean`` give what
they give on the whole changes; rules that look at signs and magnitudes of elements (``ties``, ``dare``, ``della``)
are other methods here than there, because the elements are coordinates in another basis. ``tsv`` and ``iso`` are the
same in both.

Deviations from the published code: adapters' scales are honoured, directions that no adapter has are left out, and
ranks may differ. The result has at most the sum of the ranks; ``--rank`` truncates it, which is optimal in the
Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _rules as rules

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

INFO = MethodInfo(
    summary="any rule on the adapters' coordinates in a common lossless basis",
    paper="arXiv:2509.17786",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    rule: str = option("tsv", "how the coordinates are merged", choices=rules.RULES)
    rank: int | None = option(None, "rank of every module; by default the sum of the ranks")
    density: float = option(0.5, rules.DENSITY_HELP + ", for ties, dare and della")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks, or the chosen rank."""
    rules.check_density(options.density)
    exactness = Exactness("approximate", f"the rule {options.rule} is no sum")
    if options.rule == "sum" and options.rank is None:
        exactness = Exactness("exact", "sums in the common basis are sums of the changes")
    return common.plan_merge(
        adapters,
        options,
        rank=rules.sum_rank(options.rank),
        params={"rule": options.rule, "density": options.density},
        exactness=exactness,
        memory=12,
    )


def transform(work: Work) -> dict[str, object]:
    """Merge one module's coordinates."""
    from ...linalg.core_space import core_space

    params = work.params

    def merged(pairs: list[Pair], weights: list[float]) -> Pair:
        space = core_space(pairs)
        found = rules.apply(
            params["rule"],
            space.cores,
            weights,
            density=params["density"],
            rng=lambda *path: work.rng(params["module"], *path),
        )
        return space.factors(found, params["rank"])

    return common.merge_each(work, merged)
