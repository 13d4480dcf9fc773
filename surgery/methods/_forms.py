"""How an output stores mixtures whose number of experts was changed: stock, padded, or with model code of ours.

One number of experts for all layers is what stock classes know. Numbers that differ between layers (``ragged``) are
stored ``padded`` where that is exact: a layer gets experts of zeros up to the largest number, whose entry in a bias
that counts for the selection alone, or in a router bias before a softmax of the selected, is so low that no token ever
selects them; the weights of the others do not depend on them. Elsewhere, and for a ``mapped`` router, whose rows all
stay and share fewer experts, `modeling/moesurg_mixtures.py` is written beside the model. Custom outputs use the names
of the stock modules, because no loader converts names of our model types.

A method plans with a :class:`Form` and hands ``form.of(layer).to_json()`` to its units, which write through the
same `Stored` (`_stored.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from ..checkpoint.layout import TensorSpec
from ..errors import InputError
from ..modeling import custom_config, files
from ._mixture import mixture, prediction_notes, recounted
from ._stored import Stored
from .base import Draft, Exactness, Tier

if TYPE_CHECKING:
    from ..architectures.model import Layer, Model
    from ..plan import Unit

KEY = "moesurg_mixtures"
"""The same name as in `modeling/moesurg_mixtures.py`, which imports torch."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A whole output's mixtures.

    Attributes:
        tier: how the output loads.
        layers: each mixture by layer.
    """

    model: Model
    tier: Tier
    layers: Mapping[int, Stored]

    def of(self, layer: Layer) -> Stored:
        return self.layers[layer.index]

    def specs(self, layer: Layer) -> Iterator[TensorSpec]:
        """The tensors of a layer's mixture."""
        return self.of(layer).specs(self.model, mixture(layer))

    def config(self) -> dict[str, object]:
        """The output's config."""
        largest = max(stored.rows for stored in self.layers.values())
        moe = self.model.family.moe
        fixed = moe is not None and moe.fixed_count
        if self.tier != "custom":
            return recounted(self.model, largest)
        config = dict(self.model.config.raw) if fixed else recounted(self.model, largest)
        first = self.model.moe_layers[0]
        stored, experts = self.of(first), mixture(first)
        routing = [region.tensor for region in stored.routing(experts).routing]
        names = experts.stock.shapes(stored.slots, experts.hidden, experts.width)
        config[KEY] = {
            "layers": {str(index): stored.slots for index, stored in sorted(self.layers.items())},
            "router": [name for name in names if experts.prefix + name in routing],
            "experts": [name for name in names if experts.prefix + name not in routing],
            "mapped": stored.mapped,
        }
        return custom_config(self.model.family, config)

    def files(self) -> dict[str, bytes]:
        """Model code that has to stand beside the weights."""
        return files() if self.tier == "custom" else {}

    def draft(
        self,
        tensors: Sequence[TensorSpec],
        units: Sequence[Unit],
        exactness: Exactness,
        notes: Sequence[str],
        sample: int,
    ) -> Draft:
        """The draft of an output in this form; ``notes`` follow those of the model and the form."""
        return Draft(
            self.config(),
            tensors,
            units,
            exactness,
            tier=self.tier,
            notes=[*prediction_notes(self.model), *self.note(), *notes],
            sample=sample,
            files=self.files(),
        )

    def note(self) -> list[str]:
        """What a report says of the form."""
        counts = [stored.filled for stored in self.layers.values()]
        if self.tier == "stock":
            return []
        if self.tier == "padded":
            return [
                f"layers have {min(counts)} to {max(counts)} experts; smaller ones are filled up with experts of zeros "
                "that no token selects"
            ]
        code = "the folder loads with its own model code (trust_remote_code=True)"
        if next(iter(self.layers.values())).mapped:
            return [f"router rows share experts through a stored map: {code}"]
        return [f"layers have {min(counts)} to {max(counts)} experts: {code}"]


def uniform(model: Model, count: int, *, rows: int | None = None) -> Form:
    """Equally many experts in every layer; for a tied router ``count`` slots and ``rows`` rows are the same."""
    indices = [layer.index for layer in model.moe_layers]
    if count != model.experts and model.family.moe is not None and model.family.moe.fixed_count:
        return ragged(model, dict.fromkeys(indices, count), tier="custom")
    return Form(model, "stock", {index: Stored(rows or count, count, count) for index in indices})


def ragged(
    model: Model,
    counts: Mapping[int, int],
    *,
    tier: Literal["auto", "padded", "custom"] = "auto",
) -> Form:
    """Numbers of experts by layer.

    Args:
        tier: ``auto`` is stock where all numbers are equal, then padded where that is exact, then custom.

    Raises:
        InputError: a number the layer or its router cannot work with, groups of experts, or padding where it would
            change the function.
    """
    if model.rule.groups > 1:
        raise InputError(
            f"{model.folder}: tokens select experts within {model.rule.groups} groups of one size, so that layers "
            "cannot have different numbers of experts"
        )
    for layer in model.moe_layers:
        count = counts[layer.index]
        least = max(model.rule.least_experts, 1)
        if not least <= count <= model.experts:
            raise InputError(
                f"{model.folder}: layer {layer.index} cannot have {count} experts; its router needs {least} to "
                f"{model.experts}"
            )
    if tier == "auto" and len(set(counts.values())) == 1:
        return uniform(model, next(iter(counts.values())))
    reason = why_not_padded(model)
    if tier == "padded" and reason:
        raise InputError(
            f"{model.folder}: {model.family.model_type} cannot be padded exactly: {reason}",
            hint="a custom output holds as many experts as each layer has",
        )
    if tier == "padded" or (tier == "auto" and not reason):
        most = max(counts.values())
        return Form(
            model, "padded", {index: Stored(most, most, count) for index, count in counts.items()}
        )
    return Form(
        model,
        "custom",
        {index: Stored(count, count, count, custom=True) for index, count in counts.items()},
    )


def mapped(model: Model, counts: Mapping[int, int]) -> Form:
    """All rows of the router, and ``counts`` experts that they share.

    Raises:
        InputError: the family's blocks do not call experts by index, or a number is impossible.
    """
    call = None if model.family.moe is None else model.family.moe.stock.call
    if call != "routed":
        raise InputError(
            f"{model.folder}: blocks of {model.family.model_type} do not call experts by index, so that rows cannot be "
            "mapped to them",
            hint="--router tied writes each merged expert once per member",
        )
    for index, count in counts.items():
        if not 1 <= count <= model.experts:
            raise InputError(
                f"{model.folder}: layer {index} cannot have {count} of {model.experts} experts"
            )
    return Form(
        model,
        "custom",
        {
            index: Stored(model.experts, count, count, custom=True, mapped=True)
            for index, count in counts.items()
        },
    )


def why_not_padded(model: Model) -> str:
    """Why experts that no token selects would change the function; empty where they would not.

    A bias for the selection alone leaves weights as they are if scores do not depend on each other (sigmoid); a
    bias on the logits does where weights are a softmax of the selected ones only. In a softmax over all experts
    a further row takes mass even from where nobody selects it.
    """
    layout, score = model.layout, model.rule.score
    if layout is None:
        return "it has no experts"
    if layout.correction and score == "sigmoid":
        return ""
    if layout.router_bias and score == "selected-softmax":
        return ""
    if layout.correction:
        return "the weights come from a softmax over all rows, padding included"
    return "its router has no bias that keeps an expert from being selected"
