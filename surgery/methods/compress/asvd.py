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
    summary="lower rank with input channels weighed by their strength on text",
    paper="arXiv:2312.05821",
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
    alpha: float = option(0.5, "exponent of a channel's strength; 0 weighs all channels alike")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Uniform ranks for every targeted matrix.

    Raises:
        UsageError: an option out of range.
    """
    if not 0 <= options.alpha <= 2:
        raise UsageError(f"--alpha {options.alpha} should be from 0 to 2")
    return plan_lowrank(
        models,
        form=options.form,
        ratio=options.ratio,
        targets=options.targets,
        align=options.align,
        params={"alpha": options.alpha},
        memory=16,
    )


def decide(model: Model, options: Options, statistics: Grams, seed: int) -> dict[str, Any]:
    """Nothing is decided but that every layer has its matrices; tells how many inputs they sum."""
    from ...calibration.gram_folder import layer_statistics

    return layer_statistics(statistics, model)


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix with its input channels scaled."""
    from ...calibration.gram_folder import Grams
    from ...linalg.whitening import truncate_scaled

    (region,) = work.unit.reads
    gram_NN, rows = Grams.open(work.statistics).read(work.layer, work.params["input"])
    squares_N = gram_NN.diagonal().double() / max(rows, 1)
    scale_N = squares_N.clamp_min(0).sqrt() ** work.params["alpha"]
    found = truncate_scaled(work.read(region), scale_N, work.params["rank"])
    return {**write_lowrank(work, found), "inputs": rows}
