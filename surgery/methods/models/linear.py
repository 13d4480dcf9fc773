"""The weighted mean of models: theta = sum_i w_i theta_i, with the weights normalised to the sum 1.

Model soups (arXiv:2203.05482). Every tensor is averaged, sums are in float64 for models stored in 32 bits and in
float32 for others, and rounded once to the widest type among the models. A model given several times gives itself.

Weights may be negative as long as their sum is not zero. ``--no-normalize`` keeps them as they are, so that their
sum may be anything; mergekit's ``linear`` has the same switch.

``--sweep simplex:step=0.25`` makes a model at every point of the grid of weights with the sum 1, each in a folder
of the output, and a ``manifest.json``: merges as stand-ins for models trained on mixtures of the models' data
(arXiv:2602.04937), to be ranked by ``moesurg eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import sweep
from ..base import Draft, Exactness, MethodInfo, option
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="weighted mean of models",
    paper="arXiv:2203.05482",
    inputs="two or more models of one shape",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    normalize: bool = option(True, "whether weights are divided by their sum")
    sweep: str | None = option(None, sweep.HELP, metavar="GRID")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as the weighted sum."""
    notes = common.check(models, least=2, based=False)
    weights = common.parse_weights(options.weights, len(models))
    if options.normalize:
        weights = common.shares(weights)
    return common.plan_merge(
        models,
        {"weights": weights},
        exactness=Exactness("approximate", "the output is an average of several models"),
        notes=notes,
        tensors=2,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    reading.combine(work, reading.Blocks(work, based=False, once=True), work.params["weights"])
    return {}
