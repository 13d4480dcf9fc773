"""Drop the named experts of a mixture; the others stay as they are.

The user says which experts go, of all layers or layer by layer; every other expert, its row of the router and its
entry of anything else that counts experts are moved byte for byte, in their original order. The function is the
original's with the dropped experts' logits at minus infinity before the softmax: tokens that would have selected one
take their next best, and where a family does not renormalise its weights, those of the kept experts grow.

Stock classes have one number of experts for all layers, so that every layer has to lose equally many. A router that
selects within groups of experts has to lose equally many in each group. ``prune`` chooses experts by itself; this
is for those who know which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InputError
from .._mixture import one_mixture, prediction_notes, recounted, replaced
from ..base import Draft, Exactness, MethodInfo, required
from ..prune._keep import check_counts, groups_of, members
from ._slots import moves, specs
from ._which import GRAMMAR, parse_which

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

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
        InputError: no mixture, layers or groups that would lose different numbers, or too few experts left.
    """
    model = one_mixture(models, "dropping", "drop")
    kept = kept_by_layer(model, parse_which(options.which, "--which", model))
    count = len(next(iter(kept.values())))
    tensors, units = replaced(
        model,
        lambda layer: specs(model, layer, kept[layer.index]),
        lambda layer: moves(layer, kept[layer.index]),
    )
    return Draft(
        recounted(model, count),
        tensors,
        units,
        Exactness("approximate", "tokens of dropped experts go to others"),
        notes=prediction_notes(model),
    )


def transform(work: Work) -> dict[str, object]:
    """Nothing: every unit moves bytes."""
    return {}


def kept_by_layer(model: Model, dropped: dict[int, list[int]]) -> dict[int, list[int]]:
    """The experts that stay in each layer, ascending.

    Raises:
        InputError: layers or groups keep different numbers, or fewer than the router needs.
    """
    kept = {
        index: [expert for expert in range(model.experts) if expert not in set(gone)]
        for index, gone in dropped.items()
    }
    first, *others = kept
    for index in others:
        if len(kept[index]) != len(kept[first]):
            raise InputError(
                f"{model.folder}: layer {first} would keep {len(kept[first])} experts and layer {index} "
                f"{len(kept[index])}; stock classes have one number for all layers",
                hint="drop equally many in every layer",
            )
    groups, where = groups_of(model), str(model.folder)
    check_counts(model.experts, len(kept[first]), model.rule.top_k, groups, where=where)
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
    return kept
