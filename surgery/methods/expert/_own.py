"""Mixtures whose experts are replaced by a module of ours: which families can, and what stays of the router."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...errors import InputError
from ...plan import Unit, copy_unit
from .._mixture import mixture

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model


def replaceable(model: Model, how: str) -> str:
    """The name below a layer of the module that holds the experts, of families where ours can stand in its place.

    Args:
        how: what they would become, in an error.

    Raises:
        InputError: the family calls its experts in a way of its own, or they are no plain feed-forwards.
    """
    stock = mixture(model.moe_layers[0]).stock
    plain = stock.parts == PROJECTIONS and not stock.transposed and not stock.interleaved
    if stock.call != "routed" or not plain or model.rule.scales_input:
        raise InputError(
            f"{model.folder}: experts of {model.family.model_type} cannot become {how}: "
            + (
                "they are no plain feed-forwards"
                if stock.call == "routed"
                else "its blocks do not call them by index"
            )
        )
    return stock.modules[1]


def stock_names(layer: Layer) -> Experts:
    """The layer's mixture under the names of the stock modules, which outputs with model code of ours have."""
    experts = mixture(layer)
    return dataclasses.replace(experts, layout=experts.stock)


def routing_specs(model: Model, layer: Layer) -> Iterator[TensorSpec]:
    """The router's tensors under the names of the stock modules."""
    before, after = mixture(layer), stock_names(layer)
    shapes = after.layout.routing_shapes(after.count, after.hidden)
    for old, new in zip(before.routing, after.routing, strict=True):
        shape = shapes[new.tensor.removeprefix(after.prefix)]
        yield TensorSpec(new.tensor, model.dtype(old.tensor), shape)


def routing_unit(layer: Layer) -> Unit:
    """Moves them."""
    before, after = mixture(layer), stock_names(layer)
    moves = [(old, [new]) for old, new in zip(before.routing, after.routing, strict=True)]
    return copy_unit(f"layer.{layer.index}.router", moves, layer=layer.index)
