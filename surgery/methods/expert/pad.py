"""Fill up a mixture with experts that no token selects, to a number that divides evenly.

New experts are zero, and so are their rows of the router; their entry of a bias that counts for the selection alone
is -1e9, so that they are never among a token's best. Selected experts and their weights are what they were:

* scores that are sigmoids do not depend on each other (DeepSeek-V3, GLM-4.5, dots.llm1, MiniMax-M2);
* a softmax of the selected logits does not see the others (gpt-oss, whose bias is the router's own).

Elsewhere it is refused: in a softmax over all experts a row of zeros still takes its share (Mixtral, Qwen, OLMoE), and
a bias on top of that (ERNIE-4.5) meets scores that padding has made smaller. Groups of experts are refused too, because
padding would shift them. Expert-parallel serving and loaders that split experts evenly are what it is for; the price
is the size of the zeros on disk and in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...errors import InputError, UsageError
from ...plan import Unit
from .._forms import Form, why_not_padded
from .._mixture import mixture, one_mixture, prediction_notes, replaced
from .._stored import Stored, pad
from ..base import Draft, Exactness, MethodInfo, required
from ._slots import moves

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="fill up with experts that no token selects",
    paper="",
    inputs="one mixture of experts",
    data="none",
    tier="padded",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    experts: int = required("experts that every layer has in the end")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The same model with more experts.

    Raises:
        UsageError: not more experts than there are.
        InputError: no mixture, or a router that padding would change.
    """
    model = one_mixture(models, "padding", "pad")
    if options.experts <= model.experts:
        raise UsageError(
            f"--experts {options.experts}: {model.folder} has {model.experts} already",
            hint="give a larger number",
        )
    reason = why_not_padded(model)
    if model.rule.groups > 1:
        reason = f"the router selects within {model.rule.groups} groups of experts"
    if reason:
        raise InputError(
            f"{model.folder}: {model.family.model_type} cannot be padded exactly: {reason}"
        )
    stored = Stored(options.experts, options.experts, model.experts)
    form = Form(model, "padded", {layer.index: stored for layer in model.moe_layers})
    tensors, units = replaced(model, form.specs, lambda layer: _units(layer, form.of(layer)))
    return Draft(
        form.config(),
        tensors,
        units,
        Exactness("exact", "no token selects the new experts, and weights do not see them"),
        tier="padded",
        notes=prediction_notes(model),
    )


def transform(work: Work) -> dict[str, object]:
    """Write the experts of zeros."""
    pad(work, Stored.from_json(work.params["form"]), mixture(work.model.layers[work.layer]))
    return {}


def _units(layer: Layer, stored: Stored) -> Iterator[Unit]:
    experts = mixture(layer)
    places = [*range(experts.count), *(None for _ in range(stored.slots - stored.filled))]
    yield from moves(layer, places)
    yield Unit(
        f"layer.{layer.index}.padding",
        "transform",
        layer.index,
        writes=tuple(stored.padding(experts)),
        params={"form": stored.to_json()},
        memory=16 * experts.hidden * experts.width,
    )
