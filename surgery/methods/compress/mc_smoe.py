"""MC-SMoE's compression without its training: a matrix of low rank, and a residual of whole rows.

MC-SMoE (arXiv:2310.01334; its compression is LoSparse, arXiv:2306.11222) writes an expert's matrix as W = L R + S
with L R from the SVD of W, and while it trains prunes rows of S by |weight x gradient|. This is what remains of it
without data and gradients:

    rows I of W kept (S has them less L R, so that L R + S is W there),   W[not I] = best approximation of rank R.

Since a kept row needs no low-rank part, that part is fitted to the other rows only, and I is found by alternating with
it: the rows furthest from the subspace are kept. The published quality comes from training and is not to be
expected. Merging experts first, as the paper does, is ``moesurg merge``. For the experts alone use ``--targets
gate,up,down``.

``--exact`` says how many rows are kept (the paper ends at 10 %); the rank follows from ``--ratio``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option, required
from ._exact import EXACT_HELP, LOWRANK, LOWRANK_HELP, ROUNDS_HELP, plan_exact
from ._lowrank import TARGETS_HELP
from ._parts import FORM_HELP, FORMS, RATIO_HELP, write_parts

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="low rank and a residual of whole rows",
    paper="arXiv:2310.01334",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    ratio: float = required(RATIO_HELP)
    form: str = option("parts", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)
    exact: float = option(0.1, EXACT_HELP.format("rows"))
    lowrank: str = option("pivot", LOWRANK_HELP, choices=LOWRANK)
    rounds: int = option(2, ROUNDS_HELP)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """As many rows and as high a rank in every matrix of a shape.

    Raises:
        UsageError: an option out of range.
    """
    return plan_exact(models, options, "rows")


def transform(work: Work) -> dict[str, object]:
    """Split one matrix."""
    from ...linalg.exact_parts import split_columns
    from ...linalg.lowrank import LowRank
    from ._exact import inner_tensors

    (region,) = work.unit.reads
    entry = work.params["entry"]
    found = split_columns(work.read(region).T, entry["rank"], entry["exact"], work.params["rounds"])
    turned = found.rest
    rest = LowRank(
        turned.right_RN.T.contiguous(), turned.left_MR.T.contiguous(), turned.error, turned.norm
    )
    tensors = {
        **inner_tensors(rest, entry["lowrank"]),
        "rows.weight": found.exact_MS.T,
        "row_index": found.index_S,
    }
    return write_parts(work, found.dense().T, tensors)
