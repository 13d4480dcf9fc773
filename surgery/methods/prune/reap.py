"""REAP: drop the experts with the least mean router-weighted norm of activations.

Router-weighted expert activation pruning (arXiv:2510.13999), (b, alpha, beta) = (1, 1, 1) of the family in
arXiv:2606.15716:

    S_j = mean of g_j ||f_j|| over the tokens that select expert j

where f is the expert's output and g the coefficient that really multiplies it: the stock router's own selections
and weights, renormalised, scaled and biased as the family does it, applied once. (The published code recomputes
selections from raw logits, which differ for routers with a selection bias or groups.) The lowest go, the same
number in every layer. An expert that no token selects has no mean; ``--unseen`` says what becomes of it.
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
    summary="drop the experts with the least mean router-weighted output norm",
    paper="arXiv:2510.13999",
    inputs="one mixture of experts",
    data="routed",
)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (1, 1, 1)."""
    return saliency(layer, mean=True, gate=1, norm=1)


plan = plan_scored
decide = by_score(score)
transform = transform_prune
