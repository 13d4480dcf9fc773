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

from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _rules as rules

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
    rank: int | None = option(None, "rank of every module; by default the sum of the ranks")
    density: float = option(0.2, rules.DENSITY_HELP + ", for ties, dare and della")


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
        memory=16,
    )


def transform(work: Work) -> dict[str, object]:
    """Merge one module's aligned parts."""
    from ...linalg.factors import truncated

    params = work.params

    def merged(pairs: list[Pair], weights: list[float]) -> Pair:
        basis, parts = aligned(pairs)
        found = rules.apply(
            params["rule"],
            parts,
            weights,
            density=params["density"],
            rng=lambda *path: work.rng(params["module"], *path),
        )
        down, up = truncated((found[None], basis[None]), params["rank"])
        return down[0], up[0]

    return common.merge_each(work, merged)


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
