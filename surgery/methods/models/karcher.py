"""The Riemannian centre of several models: slerp for any number of them.

Every tensor, flattened, is a length and a direction. The directions' Karcher mean on the sphere, the point mu with

    sum_i w_i log_mu(theta_i / |theta_i|) = 0

is found by the usual iteration mu <- exp_mu(sum_i w_i log_mu(.)) and gets the weighted mean of the lengths. As mu
lies in the span of the models, the iteration runs on their inner products (float64), and each tensor is read twice
whatever the number of steps. Weights are normalised. For two models of equal lengths the result is slerp's. A model
given several times gives itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, Exactness, MethodInfo
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="centre of several models on the sphere",
    paper="",
    inputs="two or more models of one shape",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor at the centre.

    Raises:
        UsageError: a negative weight.
    """
    notes = common.check(models, least=2, based=False)
    weights = common.shares(common.parse_weights(options.weights, len(models)))
    if min(weights) < 0:
        raise UsageError("--weights of a centre should not be negative")
    return common.plan_merge(
        models,
        {"weights": weights},
        exactness=Exactness("approximate", "the output lies between several models"),
        notes=notes,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import karcher_coefficients, normalised

    blocks = reading.Blocks(work, based=False)
    products = reading.gram(blocks)
    reading.combine(work, blocks, karcher_coefficients(products, work.params["weights"]))
    return {"smallest_cosine": float(normalised(products).min())}
