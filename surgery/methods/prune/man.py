"""MAN: drop the experts with the least mean norm of activations.

(b, alpha, beta) = (1, 0, 1) of the family in arXiv:2606.15716, whose authors find it to hold up on tasks that the
calibration text does not resemble:

    S_j = mean of ||f_j|| over the tokens that select expert j

where f is the expert's output before the router's weight. The lowest go, the same number in every layer. An
expert that no token selects has no mean; ``--unseen`` says what becomes of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..base import MethodInfo
from ._prune import transform_prune
from ._saliency import Options, by_score, plan_scored, saliency

if TYPE_CHECKING:
    from ...calibration.statistics import LayerStatistics
    from ._saliency import Scores

__all__ = ["INFO", "Options", "decide", "plan", "score", "transform"]

INFO = MethodInfo(
    summary="drop the experts with the least mean output norm",
    paper="arXiv:2606.15716",
    inputs="one mixture of experts",
    data="routed",
)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (1, 0, 1)."""
    return saliency(layer, mean=True, gate=0, norm=1)


plan = plan_scored
decide = by_score(score)
transform = transform_prune
