"""SLBF: MoBE with a basis of low rank for every expert, mixed freely. Slow: a GPU is advised.

    W_e = A_e SiLU(sum_j w_ej U_j V_j),   U_j [R, K], V_j [K, D], as many bases as experts,

for all three projections, down by its transpose ("Shared Low-rank Basis Factorization", 2026; the paper has no number
that we could check). A mixture of bases can have any rank up to R. Storage uses the paper's gauge: K rows of U_j,
chosen by pivoted QR, are made the identity, exactly, which saves K^2 numbers a basis.

Bases begin as each expert's leading directions, spread over R by random orthonormal columns (the paper: by matrix
signs). As in ``mobe``, Adam fits bases and weights while A_e is solved for in every step, and few steps are the
default. R is at most an expert's width (``--inner``); K follows from ``--ratio``. No text is needed; the same seed
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ..base import Draft, MethodInfo
from ._bases import BasesOptions, fit, plan_bases

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="private factors of mixed low-rank bases (iterative, GPU advised)",
    paper="",
    inputs="one mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(BasesOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Bases of one rank in every layer.

    Raises:
        UsageError: an option out of range.
        InputError: no rank removes the asked fraction.
    """
    return plan_bases(
        models,
        options,
        PROJECTIONS,
        lambda sizes, rank: {"bases": sizes.experts, "rank": rank},
        lambda sizes, inner: inner,
    )


def transform(work: Work) -> dict[str, object]:
    """Fit one layer."""
    return fit(work)
