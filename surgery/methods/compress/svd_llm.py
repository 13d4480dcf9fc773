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
Ranks and forms are those of ``svd``; ``--allocate`` goes by the losses on the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import Draft, MethodInfo, option
from ._lowrank import write_lowrank
from ._options import check_damping
from ._ranked import RankOptions, decided_with_text, plan_ranked, settle_at_ranks

if TYPE_CHECKING:
    import torch

    from ...architectures.linears import Linear
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="lower rank that keeps every layer's outputs on text",
    paper="arXiv:2403.07378",
    inputs="one dense model or mixture",
    data="gram",
    tier="custom",
)


@dataclass(frozen=True)
class Options(RankOptions):
    """What the user chooses."""

    damping: float = option(
        1e-4, "multiple of the mean of the Gram matrix's diagonal that is added to it"
    )


def plan(
    models: Sequence[Model], options: Options, decisions: Mapping[str, Any] | None = None
) -> Draft:
    """Every targeted matrix at its rank.

    Raises:
        UsageError: an option out of range.
    """
    check_damping(options.damping)
    return plan_ranked(models, options, {"damping": options.damping}, decisions, memory=40)


def decide_from_weights(
    model: Model, options: Options, statistics: Grams, weights: Weights, seed: int
) -> dict[str, Any]:
    """How many inputs each layer's matrices sum; ranks by the losses on outputs, where they are not uniform."""
    from ...linalg.lowrank import singular_values
    from ...linalg.whitening import whitened_values

    def spectrum(linear: Linear, matrix_MN: torch.Tensor) -> torch.Tensor:
        gram_NN, _ = statistics.read(linear.layer, linear.module)
        if not bool(gram_NN.any()):
            return singular_values(matrix_MN)
        return whitened_values(matrix_MN, gram_NN, damping=options.damping)

    return decided_with_text(model, options, statistics, weights, spectrum)


settle = settle_at_ranks(plan)


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
