"""KnOTS: align the adapters by one SVD of all their changes side by side, and merge in that basis.

    [dW_1 ... dW_T] = U S [V_1 ... V_T]ᵀ,   P_i = S V_iᵀ,   B A = U rule(P_1, ..., P_T)

arXiv:2410.19735. The changes are never formed: their column space is that of the stacked B_i, so the SVD is one of a
matrix with as many rows as the sum of the ranks, through its Gram matrix. The result has at most that rank, and
A = rule(P), B = U hold it without loss; ``--rank`` truncates.

Deviations: adapters' scales are honoured (the published code takes alpha = r); singular values below 1e-9 of the
largest count as zero. ``sum`` gives the weighted sum exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
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
    summary="align all adapters by one SVD of their changes side by side, merge there",
    paper="arXiv:2410.19735",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)
RULES = ("ties", "dare", "della", "sum", "mean")


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    rule: str = option("ties", "how the aligned parts are merged", choices=RULES)
    rank: int | None = option(None, ranks.SUM_HELP)
    density: float = option(0.2, rules.DENSITY_HELP + ", for ties, dare and della")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks, or the chosen rank."""
    return rules.plan_within(adapters, options, memory=16)


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Merge one module's aligned parts."""
    from ...linalg.factors import truncated

    def coordinates(pairs: list[Pair]) -> tuple[list[torch.Tensor], rules.Back]:
        basis, parts = aligned(pairs)

        def back(found: torch.Tensor) -> Pair:
            down, up = truncated((found[None], basis[None]), work.params["rank"])
            return down[0], up[0]

        return parts, back

    return rules.transform_within(work, coordinates)


def aligned(pairs: Sequence[Pair]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """U [m, p] with orthonormal columns and P_i [p, n] with U P_i = B_i A_i."""
    import torch

    from ...linalg.core_space import RTOL, span

    columns = span(torch.cat([up for _, up in pairs], dim=1))
    rows = [(columns.T @ up) @ down for down, up in pairs]
    values, vectors = torch.linalg.eigh(torch.stack([row @ row.T for row in rows]).sum(0))
    kept = values > RTOL * values[-1] if len(values) else values > 0
    turn = vectors[:, kept].flip(1)
    return columns @ turn, [turn.T @ row for row in rows]
