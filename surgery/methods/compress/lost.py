"""LOST: some columns of a matrix as they are, and a matrix of low rank for the others.

    W[:, I] kept,   W[:, not I] = best approximation of rank R,

after LOST (arXiv:2508.02668), which trains such layers from an initialisation by W: it takes the low rank from all of
W, and for I the columns of the remainder with the largest norm. Here nothing is trained, so that a column that is kept
need not be in the low-rank part as well: that part is fitted to the other columns only, which loses less with
the same storage. I is found by alternating with it: the columns furthest from the subspace are kept. The
published layer's activation between the factors and its mixing weight are left out: without training they would only
change the function.

``--exact`` says how many columns are kept; the rank follows from ``--ratio``. The low-rank part is stored in pivot rows
or two factors (``--lowrank``). No text is needed, and as for ``svd`` it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo
from ._exact import ExactOptions, plan_exact, split

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="some columns exactly, the others at low rank",
    paper="arXiv:2508.02668",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(ExactOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """As many columns and as high a rank in every matrix of a shape.

    Raises:
        UsageError: an option out of range.
    """
    return plan_exact(models, options, "columns")


def transform(work: Work) -> dict[str, object]:
    """Split one matrix."""
    return split(work)
