"""Plain truncation: every matrix becomes the nearest one of lower rank, in the Frobenius norm.

W = U S V^T is cut to its largest R singular values (Eckart and Young 1936), found through the Gram matrix on the
small side in float64; the factors come from W itself. ``--randomised`` uses a random sketch with power
iterations instead (Halko, Martinsson and Tropp, arXiv:0909.4061), which is faster for ranks below a tenth of the
matrix and loses up to a few per cent more.

The pivot form is PIFA (arXiv:2501.19090): R rows of the matrix and the coefficients of all others.

No text is needed, and for language models that shows: weights that matter little to the outputs take most of the
norm. Use ``svd-llm`` unless there is no text. One rank serves all matrices of a shape; it removes the asked fraction
of the numbers that the form really stores. Routers, norms, embeddings and the head are copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option, required
from ._lowrank import (
    ALIGN_HELP,
    FORM_HELP,
    FORMS,
    RATIO_HELP,
    TARGETS_HELP,
    plan_lowrank,
    write_lowrank,
)

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="nearest matrices of lower rank, in two factors or in pivot rows",
    paper="arXiv:2501.19090",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    ratio: float = required(RATIO_HELP)
    form: str = option("pivot", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)
    align: int = option(16, ALIGN_HELP)
    randomised: bool = option(False, "use a random sketch instead of the exact decomposition")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Uniform ranks for every targeted matrix."""
    return plan_lowrank(
        models,
        form=options.form,
        ratio=options.ratio,
        targets=options.targets,
        align=options.align,
        params={"randomised": options.randomised},
    )


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix."""
    from ...linalg.lowrank import truncate, truncate_randomised

    (region,) = work.unit.reads
    matrix, rank = work.read(region), work.params["rank"]
    if work.params["randomised"]:
        found = truncate_randomised(matrix, rank, work.rng("sketch", work.unit.id))
    else:
        found = truncate(matrix, rank)
    return write_lowrank(work, found)
