"""ASVD: truncation after every input channel is scaled by how strong it is on calibration text.

For inputs with root mean square a_j in channel j and d_j = a_j^alpha,

    W' = truncate(W diag(d), R) diag(d)^-1.

ASVD (arXiv:2312.05821) scales by the mean absolute value of a channel, here the root mean square, which the diagonal
of the Gram matrix gives; for channels of one distribution the two differ by a constant factor, which cancels. The
published code adds 1e-6 to d and truncates with an unpadded random sketch that loses a few per cent more than the
optimum; here channels that the text never reached take the smallest scale of the others, and the truncation is
exact. Its search for a rank per matrix by the perplexity of every candidate is left out: one rank serves all matrices
of a shape, as in ``svd``. ``--alpha 1`` is the whitening of ``svd-llm`` with the off-diagonal part of the Gram
matrix ignored, ``--alpha 0`` is ``svd``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..base import Draft, MethodInfo, option
from ._lowrank import write_lowrank
from ._ranked import RankOptions, decided_with_text, plan_ranked, settle_at_ranks

if TYPE_CHECKING:
    import torch

    from ...architectures.linears import Linear
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="lower rank with input channels weighed by their strength on text",
    paper="arXiv:2312.05821",
    inputs="one dense model or mixture",
    data="gram",
    tier="custom",
)


@dataclass(frozen=True)
class Options(RankOptions):
    """What the user chooses."""

    alpha: float = option(0.5, "exponent of a channel's strength; 0 weighs all channels alike")


def plan(
    models: Sequence[Model], options: Options, decisions: Mapping[str, Any] | None = None
) -> Draft:
    """Every targeted matrix at its rank.

    Raises:
        UsageError: an option out of range.
    """
    if not 0 <= options.alpha <= 2:
        raise UsageError(f"--alpha {options.alpha} should be from 0 to 2")
    return plan_ranked(models, options, {"alpha": options.alpha}, decisions, memory=16)


def decide_from_weights(
    model: Model, options: Options, statistics: Grams, weights: Weights, seed: int
) -> dict[str, Any]:
    """How many inputs each layer's matrices sum; ranks by the scaled spectra, where they are not uniform."""
    from ...linalg.lowrank import singular_values

    def spectrum(linear: Linear, matrix_MN: torch.Tensor) -> torch.Tensor:
        gram_NN, rows = statistics.read(linear.layer, linear.module)
        return singular_values(matrix_MN.double() * _scale(gram_NN, rows, options.alpha))

    return decided_with_text(model, options, statistics, weights, spectrum)


settle = settle_at_ranks(plan)


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix with its input channels scaled."""
    from ...calibration.gram_folder import Grams
    from ...linalg.whitening import truncate_scaled

    (region,) = work.unit.reads
    gram_NN, rows = Grams.open(work.statistics).read(work.layer, work.params["input"])
    scale_N = _scale(gram_NN, rows, work.params["alpha"])
    found = truncate_scaled(work.read(region), scale_N, work.params["rank"])
    return {**write_lowrank(work, found), "inputs": rows}


def _scale(gram_NN: torch.Tensor, rows: int, alpha: float) -> torch.Tensor:
    squares_N = gram_NN.diagonal().double() / max(rows, 1)
    return squares_N.clamp_min(0).sqrt() ** alpha
