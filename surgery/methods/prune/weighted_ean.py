"""Weighted EAN: drop the experts with the least summed router-weighted norm of activations.

(b, alpha, beta) = (0, p, p) of the family in arXiv:2606.15716, where p is ``--power``, 1 or 2:

    S_j = sum of (g_j ||f_j||)^p over the tokens that select expert j

where f is the expert's output and g the coefficient that really multiplies it. Being sums and no means, the
scores keep how often an expert is used, which the paper finds best where the calibration text is of the task the
model is pruned for; ``man`` and ``reap`` are the choice for general use. The lowest go, the same number in every
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..base import Draft, MethodInfo, option
from ..experts._reconstruct import ReconstructOptions
from ._prune import plan_prune, transform_prune
from ._saliency import PROTECT, PROTECT_HELP, UNSEEN, UNSEEN_HELP, decide_by_score, saliency

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics
    from ._saliency import Scores

INFO = MethodInfo(
    summary="drop the experts with the least summed router-weighted output norm",
    paper="arXiv:2606.15716",
    inputs="one mixture of experts",
    data="routed",
)


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    power: int = option(1, "power of the weighted norm, 1 or 2", metavar="P")
    protect: str = option("none", PROTECT_HELP, choices=PROTECT)
    unseen: str = option("prune", UNSEEN_HELP, choices=UNSEEN)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (0, 1, 1)."""
    return saliency(layer, mean=False, gate=1, norm=1)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    if options.power not in (1, 2):
        raise UsageError(f"--power should be 1 or 2, is {options.power}")
    return plan_prune(models, options.experts, options)


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """The experts with the highest scores."""
    return decide_by_score(
        model,
        statistics,
        lambda layer: saliency(layer, mean=False, gate=options.power, norm=options.power),
        experts=options.experts,
        protect=options.protect,
        unseen=options.unseen,
    )


transform = transform_prune
