"""Take contributors' experts out of a mixture, with their rows of the router (FlexOlmo, arXiv:2507.07024).

A FlexOlmo model is a public expert and one expert for each contributor of data, trained apart and joined, so that
expert and row of the router of a contributor can be taken away in every layer without touching anything else:

    W_r' = W_r without the rows of O,  E' = E - |O|,  k' = min(k, E')

All that remains is moved byte for byte. The softmax over fewer rows gives the mass of those that left to those that
stay, in proportion. Expert 0 is the public one, on which all others were trained, and cannot be taken out.

It works on every family whose experts can be counted anew, with the same meaning only where an expert is the
same contributor in all layers. ``drop`` takes away different experts of each layer, and never changes k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InputError, UsageError
from .._mixture import one_mixture, prediction_notes, recounted, replaced, reselected
from ..base import Draft, Exactness, MethodInfo, option, required
from ..prune._keep import check_counts, groups_of
from ._slots import moves, specs
from ._which import parse_numbers

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="take contributors' experts out, with their rows of the router",
    paper="arXiv:2507.07024",
    inputs="one mixture of experts",
    data="none",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    which: str = required("experts to take out of every layer, such as 3,7 or 8-11", metavar="LIST")
    public: int = option(0, "the expert that all others were trained beside, which has to stay")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The model without the named experts.

    Raises:
        UsageError: a list that cannot be read, or that names what is not there.
        InputError: no mixture, the public expert, or too few left for the router's groups.
    """
    model = one_mixture(models, "taking out", "take out")
    gone = parse_numbers(options.which, "--which")
    for expert in (*gone, options.public):
        if not 0 <= expert < model.experts:
            raise UsageError(f"there is no expert {expert}, the last is {model.experts - 1}")
    if options.public in gone:
        raise InputError(
            f"{model.folder}: expert {options.public} is the public one, which the others were trained beside",
            hint="--public says which one it is",
        )
    kept = [expert for expert in range(model.experts) if expert not in gone]
    top_k = min(model.rule.top_k, len(kept))
    groups = groups_of(model)
    if groups.count > 1:
        raise InputError(
            f"{model.folder}: the router selects within {groups.count} groups of experts",
            hint="expert drop takes equally many out of each group",
        )
    check_counts(model.experts, len(kept), top_k, groups, where=str(model.folder))
    tensors, units = replaced(
        model, lambda layer: specs(model, layer, kept), lambda layer: moves(layer, kept)
    )
    notes = prediction_notes(model)
    if top_k < model.rule.top_k:
        notes.append(f"a token selects {top_k} experts, as many as there are left")
    return Draft(
        reselected(model, recounted(model, len(kept)), top_k),
        tensors,
        units,
        Exactness("approximate", "what those experts gave is gone, and others share their weight"),
        notes=notes,
    )


def transform(work: Work) -> dict[str, object]:
    """Nothing: every unit moves bytes."""
    return {}
