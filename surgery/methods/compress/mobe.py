"""MoBE: experts as private factors of mixed bases that all experts of a layer share. Slow: a GPU is advised.

    W_e = A_e f(sum_j w_ej B_j),   w_e a softmax,   f SiLU or tanh

for gate and up; down stays whole (arXiv:2508.05257). Matrices are divided by their standard deviation, which the
private factors take back. Bases begin as the leading directions of groups of consecutive experts.

As published, bases and weights are fitted by Adam on full batches and the best step counts. Ours solves for A_e by
least squares in every step instead of descending on it, which needs far fewer steps; ``--steps`` is small by default,
so that a small model takes minutes on a CPU, and more give a closer fit. The published R is an expert's width, which
saves only where the model is much wider; ``--inner`` sets it. The number of bases follows from ``--ratio``. With
``--steps 0`` the start is stored. No text is needed; the same seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo
from ._bases import BasesOptions, fit, plan_bases

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="private factors of mixed shared bases (iterative, GPU advised)",
    paper="arXiv:2508.05257",
    inputs="one mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(BasesOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """As many bases in every layer.

    Raises:
        UsageError: an option out of range.
        InputError: no number of bases removes the asked fraction.
    """
    return plan_bases(
        models,
        options,
        ("gate", "up"),
        lambda sizes, count: {"bases": count},
        lambda sizes, inner: sizes.experts,
    )


def transform(work: Work) -> dict[str, object]:
    """Fit one layer."""
    return fit(work)
