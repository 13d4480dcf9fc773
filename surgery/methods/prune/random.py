"""Random: drop experts drawn at random, the control every other method has to beat.

In every layer the experts to keep are a uniformly random subset of the asked-for size, without looking at the
weights or at any text. The draw depends on ``--seed`` and the layer alone, so equal requests keep equal experts;
average over several seeds before comparing. Kim et al. (arXiv:2109.10465) use it as a control in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...seeding import stream
from ..base import Draft, MethodInfo
from ..experts._reconstruct import ReconstructOptions as Options
from ._keep import groups_of, keep_list
from ._prune import need_text, plan_prune, transform_prune

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics
    from ...weights import Weights

__all__ = ["INFO", "Options", "decide_from_weights", "plan", "transform"]

INFO = MethodInfo(
    summary="drop experts drawn at random, as a control",
    paper="arXiv:2109.10465",
    inputs="one mixture of experts",
    data="none",
)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    return need_text(plan_prune(models, options.experts, options), options)


def decide_from_weights(
    model: Model, options: Options, statistics: Statistics | None, weights: Weights, seed: int
) -> dict[str, Any]:
    """The experts with the highest of uniformly drawn scores."""
    decided = {}
    for layer in model.moe_layers:
        scores = [float(x) for x in stream(seed, "random", layer.index).random(model.experts)]
        kept = keep_list(
            scores, options.experts, groups=groups_of(model).count, where=f"layer {layer.index}"
        )
        decided[str(layer.index)] = {"kept": kept, "scores": scores}
    return decided


transform = transform_prune
