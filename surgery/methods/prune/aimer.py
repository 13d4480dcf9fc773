"""AIMER: drop the experts whose weights are spread most evenly, without any text.

AIMER (arXiv:2603.18492). With w all n entries of an expert's gate, up and down projections:

    S = mean |w| / root mean w^2 = ||w||_1 / (sqrt(n) ||w||_2), between 1 / sqrt(n) and 1

The highest go, the same number in every layer; of equal scores the lower index goes. The score does not depend on
the scale of the weights, on the order of neurons or on how the tensors are stored. Normally distributed weights
give sqrt(2 / pi) = 0.798, so the scores of real experts lie close together and the sums are kept in float64. They
are taken in one pass over the experts' weights, a few million elements at a time.

The published code lowers the number of experts a token selects where fewer are kept; here that is refused. An
expert of nothing but zeros counts as 1, like any constant, and goes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from .._mixture import mixture
from ..base import Draft, MethodInfo
from ..experts._reconstruct import ReconstructOptions as Options
from ._keep import groups_of, keep_list
from ._prune import need_text, plan_prune, transform_prune

if TYPE_CHECKING:
    from ...architectures.model import Experts, Model
    from ...calibration.statistics import Statistics
    from ...weights import Weights

__all__ = ["INFO", "Options", "decide_from_weights", "plan", "transform"]

INFO = MethodInfo(
    summary="drop the experts with the largest mean |w| relative to the root mean square",
    paper="arXiv:2603.18492",
    inputs="one mixture of experts",
    data="none",
)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    return need_text(plan_prune(models, options.experts, options), options)


def decide_from_weights(
    model: Model, options: Options, statistics: Statistics | None, weights: Weights, seed: int
) -> dict[str, Any]:
    """The experts with the lowest scores. Uses no randomness."""
    scores: dict[int, list[float]] = {layer.index: [] for layer in model.moe_layers}
    everyone = [(layer, expert) for layer in model.moe_layers for expert in range(model.experts)]
    for layer, expert in weights.track(everyone):
        scores[layer.index].append(_score(weights, mixture(layer), expert))
    decided = {}
    for index, found in scores.items():
        kept = keep_list(
            [-score for score in found],
            options.experts,
            groups=groups_of(model).count,
            where=f"layer {index}",
        )
        decided[str(index)] = {"kept": kept, "scores": found}
    return decided


transform = transform_prune


def ratio(total: float, squares: float, count: int) -> float:
    """Mean over root mean square, from the sums of |w| and w^2 of ``count`` entries; 1 for zeros."""
    return float(total / (count * squares) ** 0.5) if squares > 0 else 1.0


def _score(weights: Weights, experts: Experts, expert: int) -> float:
    import torch

    total = squares = 0.0
    count = 0
    for projection in PROJECTIONS:
        region = experts.region(expert, projection)
        count += region.count
        for block in weights.blocks(region):
            wide = block.double().flatten()
            # In one pass each, without temporaries.
            total += float(torch.linalg.vector_norm(wide, 1))
            squares += float(wide @ wide)
    return ratio(total, squares, count)
