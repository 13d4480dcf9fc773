"""Add fine-tunes' changes to their base: theta = theta_0 + s sum_i w_i (theta_i - theta_0).

Task Arithmetic (arXiv:2212.04089). The first source is the base. Weights are 1 each and are not normalised; a
negative one takes a skill away. With one fine-tune of weight 1 the output is that fine-tune. The paper tunes
``--scale``, with good values of 0.3 to 0.4 for eight tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, Exactness, MethodInfo
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="add the changes of fine-tunes to their base",
    paper="arXiv:2212.04089",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.ChangeOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus weighted changes."""
    notes = common.check(models, least=2, based=True)
    weights = common.parse_weights(options.weights, len(models) - 1)
    return common.plan_merge(
        models,
        {"weights": weights, "scale": options.scale},
        exactness=Exactness("approximate", "changes of fine-tunes are added to the base"),
        notes=notes,
        tensors=2,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    params = work.params
    reading.combine(
        work, reading.Blocks(work, based=True, once=True), params["weights"], params["scale"]
    )
    return {}
