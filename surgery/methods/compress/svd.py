"""Plain truncation: every matrix becomes the nearest one of lower rank, in the Frobenius norm.

W = U S V^T is cut to its largest R singular values (Eckart and Young 1936), found through the Gram matrix on the
small side in float64; the factors come from W itself. ``--fast`` uses a random sketch with power
iterations instead (Halko, Martinsson and Tropp, arXiv:0909.4061), which is faster for ranks below a tenth of the
matrix and loses up to a few per cent more.

The pivot form is PIFA (arXiv:2501.19090): R rows of the matrix and the coefficients of all others.

No text is needed, and for language models that shows: weights that matter little to the outputs take most of the
norm. Use ``svd-llm`` unless there is no text. One rank serves all matrices of a shape; it removes the asked fraction
of the numbers that the form really stores. Routers, norms, embeddings and the head are copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import Draft, MethodInfo, option
from ._lowrank import write_lowrank
from ._ranked import RankOptions, decided_ranks, own_spectrum, plan_ranked, settle_at_ranks

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="nearest matrices of lower rank, in two factors or in pivot rows",
    paper="arXiv:2501.19090",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(RankOptions):
    """What the user chooses."""

    fast: bool = option(False, "use a random sketch instead of the exact decomposition")


def plan(
    models: Sequence[Model], options: Options, decisions: Mapping[str, Any] | None = None
) -> Draft:
    """Every targeted matrix at its rank."""
    return plan_ranked(models, options, {"fast": options.fast}, decisions)


def decide_from_weights(
    model: Model,
    options: Options,
    statistics: Statistics | None,
    weights: Weights,
    seed: int,
) -> dict[str, Any]:
    """Ranks by the matrices' own singular values, where they are not uniform."""
    return decided_ranks(model, options, weights, own_spectrum) or {}


settle = settle_at_ranks(plan)


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix."""
    from ...linalg.lowrank import truncate, truncate_randomised

    (region,) = work.unit.reads
    matrix, rank = work.read(region), work.params["rank"]
    if work.params["fast"]:
        found = truncate_randomised(matrix, rank, work.rng("sketch", work.unit.id))
    else:
        found = truncate(matrix, rank)
    return write_lowrank(work, found)
