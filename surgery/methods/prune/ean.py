"""EAN: drop the experts with the least summed norm of activations.

Expert activation norm (MC-Suite, arXiv:2504.05586), (b, alpha, beta) = (0, 0, 1) of the family in
arXiv:2606.15716:

    S_j = sum of ||f_j|| over the tokens that select expert j

where f is the expert's output before the router's weight. The lowest go, the same number in every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..base import Draft, MethodInfo
from ._prune import plan_prune, transform_prune
from ._saliency import Options, decide_by_score, saliency

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics
    from ._saliency import Scores

__all__ = ["INFO", "Options", "decide", "plan", "score", "transform"]

INFO = MethodInfo(
    summary="drop the experts with the least summed output norm",
    paper="arXiv:2504.05586",
    inputs="one mixture of experts",
    data="routed",
)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    return plan_prune(models, options.experts)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (0, 0, 1)."""
    return saliency(layer, mean=False, gate=0, norm=1)


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """The experts with the highest scores."""
    return decide_by_score(
        model,
        statistics,
        score,
        experts=options.experts,
        protect=options.protect,
        unseen=options.unseen,
    )


transform = transform_prune
