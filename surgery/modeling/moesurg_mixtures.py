"""Mixtures that differ between layers, or whose router rows share experts. Part of the model code of moesurg."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

KEY = "moesurg_mixtures"
ROW_MAP = "moesurg_expert_of_row"
"""Buffer of a mapped layer's experts module: which expert each row of the router means, int32."""


@cache
def _mapped(stock: Any) -> type:
    """The experts class whose indices are rows of the router.

    Two selected rows of one expert stay two selections, whose weighted outputs the stock class adds up: the token
    gets that expert with the sum of both weights.
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        chosen = getattr(self, ROW_MAP).to(index.dtype)[index]
        output: torch.Tensor = stock.forward(self, hidden_states, chosen, weights)
        return output

    return type("Mapped" + stock.__name__, (stock,), {"__module__": __name__, "forward": forward})


def resize(layer: nn.Module, name: str, before: int, count: int) -> None:
    """Give a parameter or buffer that has one entry per expert another number of entries."""
    place, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(place)
    old = getattr(owner, leaf)
    shape = list(old.shape)
    shape[shape.index(before)] = count
    new = old.new_zeros(shape)
    if leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(owner, leaf, new)
    while place:
        module: Any = layer.get_submodule(place)
        for attribute in ("num_experts", "out_features"):
            if getattr(module, attribute, None) == before:
                setattr(module, attribute, count)
        place = place.rpartition(".")[0]


def apply(body: Any, config: Any) -> None:
    """Give the listed layers of a base model the experts that were stored.

    Stock classes add up a balancing loss over layers of one size when they are asked for router logits; layers of
    several sizes have no such loss, so it is not to be asked for.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_mixtures`` has ``layers``: experts by layer; ``router`` and ``experts``: names below a
            layer of the tensors with one entry per row and per expert; ``mapped``: whether the router keeps all
            of its rows, and each layer's map says which expert a row means.

    Raises:
        ValueError: no number of experts, or one above the number of rows that are mapped to them.
    """
    entry = getattr(config, KEY)
    for index, count in entry["layers"].items():
        layer = body.layers[int(index)]
        place, _, leaf = entry["experts"][0].rpartition(".")
        experts: Any = layer.get_submodule(place)
        before = getattr(experts, leaf).shape[0]
        if count < 1 or (entry["mapped"] and count > before):
            raise ValueError(f"config.json: layer {index} cannot have {count} experts")
        for name in entry["experts"] if entry["mapped"] else (*entry["router"], *entry["experts"]):
            resize(layer, name, before, count)
        if entry["mapped"]:
            experts.register_buffer(ROW_MAP, torch.arange(before, dtype=torch.int32) % count)
            kind: Any = type(experts)
            experts.__class__ = _mapped(kind)
