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
from ..base import Draft, MethodInfo, option, required
from ._bases import (
    ACTIVATION_HELP,
    ACTIVATIONS,
    INNER_HELP,
    STEPS_HELP,
    check,
    choose_entries,
    fit,
    inner_width,
)
from ._experts import FORM_HELP, FORMS, RATIO_HELP, Entries, Sizes, plan_experts

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
class Options:
    """What the user chooses."""

    ratio: float = required(RATIO_HELP)
    form: str = option("shared", FORM_HELP, choices=FORMS)
    inner: int = option(0, INNER_HELP)
    activation: str = option("silu", ACTIVATION_HELP, choices=ACTIVATIONS)
    steps: int = option(100, STEPS_HELP)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Bases of one rank in every layer.

    Raises:
        UsageError: an option out of range.
        InputError: no rank removes the asked fraction.
    """
    check(options)

    def entries_of(model: Model, sizes: Sizes) -> Entries:
        inner = inner_width(options, sizes, 3)

        def make(rank: int) -> Entries:
            return {
                part: {
                    "form": "bases",
                    "inner": inner,
                    "bases": sizes.experts,
                    "rank": rank,
                    "activation": options.activation,
                    "transposed": part == "down",
                }
                for part in PROJECTIONS
            }

        return choose_entries(model, sizes, options.ratio, make, inner)

    return plan_experts(
        models,
        form=options.form,
        ratio=options.ratio,
        entries_of=entries_of,
        params={"steps": options.steps},
        memory=lambda sizes: 8 * sizes.numbers,
    )


def transform(work: Work) -> dict[str, object]:
    """Fit one layer."""
    return fit(work)
