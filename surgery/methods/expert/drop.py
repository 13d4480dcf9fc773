"""Drop the named experts of a mixture; the others stay as they are.

The user says which experts go, of all layers or layer by layer; every other expert, its row of the router and its
entry of anything else that counts experts are moved byte for byte, in their original order. The function is the
original's with the dropped experts' logits at minus infinity before the softmax: tokens that would have selected one
take their next best, and where a family does not renormalise its weights, those of the kept experts grow.

Where layers lose different numbers, the output is padded if the router has a bias that makes padding exact, and has
model code of ours otherwise. A router that selects within groups of experts has to lose equally many in each
group of every layer. ``prune`` chooses experts by itself; this is for those who know which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from .._mixture import one_mixture
from ..base import Draft, MethodInfo, required
from ..prune._keep import groups_of, members
from ..prune._prune import plan_prune, transform_prune
from ._which import GRAMMAR, parse_which

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics
    from ...weights import Weights

__all__ = ["INFO", "Options", "decide_from_weights", "plan", "transform"]

INFO = MethodInfo(
    summary="drop the experts that are named",
    paper="",
    inputs="one mixture of experts",
    data="none",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    which: str = required(f"experts to drop: {GRAMMAR}", metavar="LIST")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The model without the named experts.

    Raises:
        UsageError: a list that cannot be read, or that names what is not there.
        InputError: no mixture, groups that would lose different numbers, or too few experts left.
    """
    model = one_mixture(models, "dropping", "drop")
    kept = _kept(model, options)
    _check_groups(model, kept)
    counts = {index: len(stay) for index, stay in kept.items()}
    first = next(iter(counts.values()))
    if len(set(counts.values())) == 1:
        return plan_prune(models, first)
    return plan_prune(models, first, counts=counts)


def decide_from_weights(
    model: Model, options: Options, statistics: Statistics | None, weights: Weights, seed: int
) -> dict[str, Any]:
    """What the user decided."""
    return {str(index): {"kept": stay} for index, stay in _kept(model, options).items()}


transform = transform_prune


def _kept(model: Model, options: Options) -> dict[int, list[int]]:
    """The experts that stay in each layer, ascending."""
    dropped = parse_which(options.which, "--which", model)
    return {
        index: [expert for expert in range(model.experts) if expert not in gone]
        for index, gone in dropped.items()
    }


def _check_groups(model: Model, kept: Mapping[int, Sequence[int]]) -> None:
    groups = groups_of(model)
    for index, stay in kept.items():
        sizes = [
            sum(expert in group for expert in stay)
            for group in members(model.experts, groups.count)
        ]
        if len(set(sizes)) > 1:
            raise InputError(
                f"{model.folder}: layer {index} would keep {', '.join(map(str, sizes))} experts in the groups of "
                "its router",
                hint="drop equally many in every group",
            )
