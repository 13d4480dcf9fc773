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

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _rules as rules
from . import _saved as saved

if TYPE_CHECKING:
    import torch

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
    rank: int | None = option(None, ranks.SUM_HELP)
    density: float = option(0.5, rules.DENSITY_HELP + ", for ties, dare and della")


plan = rules.plan_within


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Merge one module's coordinates."""
    from ...linalg.core_space import core_space

    def coordinates(pairs: list[Pair]) -> tuple[list[torch.Tensor], rules.Back]:
        space = core_space(pairs)
        return space.cores, lambda found: space.factors(found, work.params["rank"])

    return rules.transform_within(work, coordinates)
