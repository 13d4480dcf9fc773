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

from ..base import Draft, MethodInfo, option
from ._exact import EXACT_HELP, ExactOptions, plan_exact, split

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
class Options(ExactOptions):
    """What the user chooses."""

    exact: float = option(0.1, EXACT_HELP.format("rows"))


def plan(models: Sequence[Model], options: Options) -> Draft:
    """As many rows and as high a rank in every matrix of a shape.

    Raises:
        UsageError: an option out of range.
    """
    return plan_exact(models, options, "rows")


def transform(work: Work) -> dict[str, object]:
    """Split one matrix."""
    return split(work)
