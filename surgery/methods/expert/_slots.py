"""A mixture whose every place is filled from the original's experts by name: fewer, more, or in another order.

What is known before a weight is read is moved as bytes; a method adds units of its own for the places that it
fills with something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit, copy_unit
from .._mixture import blocks, mixture

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model


def resized(layer: Layer, count: int) -> Experts:
    """The layer's mixture with another number of experts, under the same names."""
    return dataclasses.replace(mixture(layer), count=count)


def specs(model: Model, layer: Layer, chosen: Sequence[int]) -> Iterator[TensorSpec]:
    """Tensors of a mixture whose place i is shaped, and stored in the type, as the original's expert ``chosen[i]``.

    Raises:
        InputError: experts of several types would share a tensor.
    """
    experts, output = mixture(layer), resized(layer, len(chosen))
    dtypes = {
        after.tensor: model.dtype(before.tensor)
        for before, after in zip(experts.routing, output.routing, strict=True)
    }
    for place, expert in enumerate(chosen):
        for part, region in experts.regions(expert).items():
            name = output.region(place, part).tensor
            kind = model.dtype(region.tensor)
            if dtypes.setdefault(name, kind) != kind:
                raise InputError(
                    f"{model.folder}: {region.tensor!r} is stored as {kind}, what shares {name!r} with it as "
                    f"{dtypes[name]}"
                )
    for name, shape in output.layout.shapes(len(chosen), output.hidden, output.width).items():
        yield TensorSpec(output.prefix + name, dtypes[output.prefix + name], shape)


def moves(layer: Layer, chosen: Sequence[int | None], *, routed: int | None = None) -> list[Unit]:
    """The unit, if there is anything to do, that moves the experts ``chosen`` with all that counts them.

    Args:
        chosen: the original's expert for each place; None leaves a place out.
        routed: how many places, from the first on, also get their entries of router and biases; None for all.
    """
    experts, output = mixture(layer), resized(layer, len(chosen))
    found: list[tuple[Region, list[Region]]] = []
    # An expert that goes to several places is read once.
    places: dict[int, list[int]] = {}
    for place, expert in enumerate(chosen):
        if expert is not None:
            places.setdefault(expert, []).append(place)
    for expert, its in sorted(places.items()):
        writes = [blocks(output, place) for place in its]
        reads = blocks(experts, expert)
        found.extend((read, [each[at] for each in writes]) for at, read in enumerate(reads))
        kept = [place for place in its if routed is None or place < routed]
        entries = [routing(output, place) for place in kept]
        if kept:
            reads = routing(experts, expert)
            found.extend((read, [each[at] for each in entries]) for at, read in enumerate(reads))
    name = f"layer.{layer.index}.experts"
    return [copy_unit(name, found, layer=layer.index)] if found else []


def routing(experts: Experts, expert: int) -> list[Region]:
    """An expert's entries of everything that decides the routing."""
    return [whole.rows(expert, expert + 1) for whole in experts.routing]
