"""SVD-LLM: truncation that keeps the outputs of every linear layer on calibration text.

For inputs X of a layer and C = X^T X, the matrix of rank R that minimises the Frobenius norm of X (W - W')^T is

    W' = U U^T W,   U = leading R eigenvectors of W C W^T.

SVD-LLM (arXiv:2403.07378) computes the same matrix from a Cholesky factor S of C as the truncation of W S times the
inverse of S; this form needs no inverse and takes a singular C (fewer tokens than inputs, dead channels). Matrices
with many more rows than columns are decomposed on their input side, which gives the same.

All Gram matrices are those of the original model: the paper's sequential update, which solves for the factors
again after each compressed layer, is left out. ``--damping`` adds a multiple of the mean diagonal to C, so that
directions the text did not show are not cut for free. All experts of a mixture use the Gram matrix of the mixture's
input for gate and up; down uses each expert's own, and the plain truncation where no token chose the expert.
Ranks and forms are those of ``svd``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
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
    from ...calibration.gram_folder import Grams
    from ...execute import Work

INFO = MethodInfo(
    summary="lower rank that keeps every layer's outputs on text",
    paper="arXiv:2403.07378",
    inputs="one dense model or mixture",
    data="gram",
    tier="custom",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    ratio: float = required(RATIO_HELP)
    form: str = option("pivot", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)
    align: int = option(16, ALIGN_HELP)
    damping: float = option(
        1e-4, "multiple of the mean of the Gram matrix's diagonal that is added to it"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Uniform ranks for every targeted matrix.

    Raises:
        UsageError: an option out of range.
    """
    if not 0 <= options.damping < float("inf"):
        raise UsageError(f"--damping {options.damping} should be at least 0")
    return plan_lowrank(
        models,
        form=options.form,
        ratio=options.ratio,
        targets=options.targets,
        align=options.align,
        params={"damping": options.damping},
        memory=40,
    )


def decide(model: Model, options: Options, statistics: Grams, seed: int) -> dict[str, Any]:
    """Nothing is decided but that every layer has its matrices; tells how many inputs they sum."""
    from ...calibration.gram_folder import layer_statistics

    return layer_statistics(statistics, model)


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix by its inputs' Gram matrix."""
    from ...calibration.gram_folder import Grams
    from ...linalg.lowrank import truncate
    from ...linalg.whitening import truncate_whitened

    (region,) = work.unit.reads
    matrix, rank = work.read(region), work.params["rank"]
    gram, rows = Grams.open(work.statistics).read(work.layer, work.params["input"])
    seen = bool(gram.any())
    found = (
        truncate_whitened(matrix, gram, rank, damping=work.params["damping"])
        if seen
        else truncate(matrix, rank)
    )
    return {**write_lowrank(work, found), "inputs": rows}
