"""The linear layers of a model's decoder blocks, one by one, with the inputs they share."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..checkpoint.region import Region
from .base import PROJECTIONS
from .model import Layer, Model

GROUPS = {
    "attention": "the projections of attention",
    "ffn": "gate, up and down of dense feed-forwards, experts and shared experts",
}

_WEIGHT = re.compile(r"(?:.*\.)?(\w+?)_proj\.weight")
_EXPERTS = "mlp.experts"


@dataclass(frozen=True)
class Linear:
    """One linear layer: a projection of attention or of a feed-forward. No router, norm or embedding.

    Attributes:
        layer: index of the decoder layer.
        region: its weight [out, in].
        group: a key of GROUPS.
        role: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down`` and what else a family has.
        module: the name of its module below the layer's prefix; for an expert, whose matrices have no
            module of their own in stock transformers, the name of the input its Gram matrix is of.
        expert: index of its expert, or None.
    """

    layer: int
    region: Region
    group: str
    role: str
    module: str
    expert: int | None = None

    @property
    def label(self) -> str:
        """A name that is unique in the model."""
        middle = "" if self.expert is None else f"expert.{self.expert}.{self.role}"
        return f"layer.{self.layer}.{middle or self.module}"


def expert_input(expert: int | None = None) -> str:
    """The name of the mixture's input, or of one expert's hidden activations."""
    return f"{_EXPERTS}.input" if expert is None else f"{_EXPERTS}.{expert}.hidden"


def linears(model: Model) -> Iterator[Linear]:
    """Every linear layer of every decoder block, in model order."""
    for layer in model.layers:
        yield from _attention(model, layer)
        for role, region in layer.ffn.items():
            yield Linear(layer.index, region, "ffn", role, _module(layer, region.tensor))
        if layer.experts is not None:
            for expert in range(layer.experts.count):
                for role in PROJECTIONS:
                    source = expert_input(expert if role == "down" else None)
                    region = layer.experts.region(expert, role)
                    yield Linear(layer.index, region, "ffn", role, source, expert)
        for name in layer.shared:
            found = _WEIGHT.fullmatch(name)
            if found:
                module = _module(layer, name)
                yield Linear(layer.index, model.whole(name), "ffn", found[1], module)


def _attention(model: Model, layer: Layer) -> Iterator[Linear]:
    for name, shape in model.family.attention(model.config).items():
        found = _WEIGHT.fullmatch(name)
        if found and len(shape) == 2:
            whole = model.whole(layer.prefix + name)
            yield Linear(layer.index, whole, "attention", found[1], _module(layer, whole.tensor))


def _module(layer: Layer, tensor: str) -> str:
    return tensor.removeprefix(layer.prefix).removesuffix(".weight")
