"""Frequency: drop the experts that the fewest tokens select.

Pruning by utilisation, as in Kim et al. (arXiv:2109.10465), who rank the experts of a layer by their share of the
tokens of a validation set:

    S_j = number of tokens that select expert j

The lowest go, the same number in every layer. It is a baseline: an expert that is rarely selected may still be
the one that matters where it is. The paper's continued training afterwards is not done.
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
    summary="drop the experts that the fewest tokens select",
    paper="arXiv:2109.10465",
    inputs="one mixture of experts",
    data="routed",
)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (0, 0, 0)."""
    return saliency(layer, mean=False, gate=0, norm=0)


plan = plan_scored
decide = by_score(score)
transform = transform_prune
