"""Scores from routing statistics, and the decisions that follow from them.

With g the coefficient that multiplies an expert's output f in the mixture (what the stock router gives, after
renormalisation and scaling), summed over the tokens t that select expert j (arXiv:2606.15716):

    S_j(b, alpha, beta) = sum over t of g_jt^alpha ||f_jt||^beta / count_j^b

Each method file names its (b, alpha, beta). Selections and coefficients are the stock router's own, so that a
router with a bias or groups is measured as it works. An expert that no token selects has no score: it goes
first, stays, or is an error, as ``--unseen`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..base import Draft, option
from ..experts._reconstruct import ReconstructOptions
from ._keep import groups_of, keep_list, super_experts
from ._prune import plan_prune

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics

    Scores = NDArray[np.float64]

PROTECT_HELP = (
    "super: never drop an expert of the first three quarters of the layers whose largest absolute output "
    "exceeds the 99.5th percentile of all experts and a tenth of the largest; none: any may go"
)
UNSEEN_HELP = (
    "experts that no calibration token selects: prune them first, keep them, or stop with an error"
)
PROTECT, UNSEEN = ("none", "super"), ("prune", "keep", "error")

SUMS = {
    (0, 0): "count_E",
    (1, 0): "gate_E",
    (0, 1): "norm_E",
    (0, 2): "norm2_E",
    (1, 1): "gate_norm_E",
    (2, 1): "gate2_norm_E",
    (2, 2): "gate2_norm2_E",
}
"""The field that holds the sum of g^alpha ||f||^beta, by (alpha, beta)."""


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    protect: str = option("none", PROTECT_HELP, choices=PROTECT)
    unseen: str = option("prune", UNSEEN_HELP, choices=UNSEEN)


@dataclass(frozen=True)
class Constraints:
    """What a layer's decision must respect.

    Attributes:
        protected: super experts.
        unseen: experts that no token selects.
        forced: experts that stay.
    """

    protected: list[int]
    unseen: list[int]
    forced: frozenset[int]

    def to_json(self) -> dict[str, Any]:
        return {"protected": self.protected, "unseen": self.unseen}


def saliency(layer: LayerStatistics, *, mean: bool, gate: int, norm: int) -> Scores:
    """S(b, alpha, beta) of every expert, b = 1 where ``mean``; 0 for an expert that no token selects."""
    import numpy as np

    sum_E: Scores = getattr(layer, SUMS[gate, norm])
    return sum_E / np.maximum(layer.count_E, 1.0) if mean else sum_E


def constraints(
    model: Model, statistics: Statistics, protect: str, unseen: str
) -> dict[int, Constraints]:
    """What must stay, by layer.

    Raises:
        InputError: there was no text, or an expert was not selected and that is asked to be an error.
    """
    protected = super_experts(model, statistics) if protect == "super" else {}
    found = {}
    for layer in model.moe_layers:
        count_E = statistics.layer(layer.index).count_E
        if not count_E.sum():
            raise InputError(
                f"layer {layer.index}: the statistics saw no token; calibrate on some text"
            )
        never = [expert for expert, count in enumerate(count_E) if not count]
        if never and unseen == "error":
            raise InputError(
                f"layer {layer.index}: no calibration token selects the experts "
                f"{', '.join(map(str, never))}",
                hint="calibrate on more or other text, or choose --unseen prune or keep",
            )
        special = protected.get(layer.index, [])
        forced = frozenset([*special, *(never if unseen == "keep" else [])])
        found[layer.index] = Constraints(special, never, forced)
    return found


def plan_scored(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    return plan_prune(models, options.experts, options)


def by_score(
    score: Callable[[LayerStatistics], Scores],
) -> Callable[[Model, Any, Statistics, int], dict[str, Any]]:
    """The ``decide`` of methods with options ``protect`` and ``unseen``: the highest scores stay. No randomness."""

    def decide(model: Model, options: Any, statistics: Statistics, seed: int) -> dict[str, Any]:
        return decide_by_score(
            model,
            statistics,
            score,
            experts=options.experts,
            protect=options.protect,
            unseen=options.unseen,
        )

    return decide


def decide_by_score(
    model: Model,
    statistics: Statistics,
    score: Callable[[LayerStatistics], Scores],
    *,
    experts: int,
    protect: str,
    unseen: str,
) -> dict[str, Any]:
    """Keep the experts with the highest scores in every layer. Uses no randomness."""
    decided = {}
    for index, limits in constraints(model, statistics, protect, unseen).items():
        scores = [float(value) for value in score(statistics.layer(index))]
        never = set(limits.unseen)
        ranked = [float("-inf") if i in never else value for i, value in enumerate(scores)]
        kept = keep_list(
            ranked,
            experts,
            groups=groups_of(model).count,
            forced=limits.forced,
            where=f"layer {index}",
        )
        reported = [None if i in never else value for i, value in enumerate(scores)]
        decided[str(index)] = {"kept": kept, "scores": reported, **limits.to_json()}
    return decided
