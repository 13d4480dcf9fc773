"""Gate: drop the experts with the least summed router weight.

The weighted frequency, (b, alpha, beta) = (0, 1, 0) of the family in arXiv:2606.15716:

    S_j = sum of g_j over the tokens that select expert j

where g is the coefficient that really multiplies the expert's output: renormalised and scaled where the family
does that. The lowest go, the same number in every layer. Sizes of outputs play no part.
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
    summary="drop the experts with the least summed router weight",
    paper="arXiv:2606.15716",
    inputs="one mixture of experts",
    data="routed",
)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (0, 1, 0)."""
    return saliency(layer, mean=False, gate=1, norm=0)


plan = plan_scored
decide = by_score(score)
transform = transform_prune
