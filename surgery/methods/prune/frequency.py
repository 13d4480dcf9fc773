"""Frequency: drop the experts that the fewest tokens select.

Pruning by utilisation, as in Kim et al. (arXiv:2109.10465), who rank the experts of a layer by their share of the
tokens of a validation set:

    S_j = number of tokens that select expert j

The lowest go, the same number in every layer. It is a baseline: an expert that is rarely selected may still be
the one that matters where it is. The paper's continued training afterwards is not done.
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
    summary="drop the experts that the fewest tokens select",
    paper="arXiv:2109.10465",
    inputs="one mixture of experts",
    data="routed",
)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    return plan_prune(models, options.experts)


def score(layer: LayerStatistics) -> Scores:
    """(b, alpha, beta) = (0, 0, 0)."""
    return saliency(layer, mean=False, gate=0, norm=0)


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
