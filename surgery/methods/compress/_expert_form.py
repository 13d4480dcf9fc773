"""Where a custom output keeps the experts of a layer: every projection as its entry says, the routing as stock does.

The part of the model code is `modeling/moesurg_shared_experts.py`. Custom outputs use the names of the stock modules,
because no loader converts names of our model types.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from .._mixture import check_expert_types, mixture
from .._stored import Stored
from ._entries import Entry, Leaf, expert_leaves

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model

KEY = "moesurg_shared_experts"
"""The same as in `modeling/moesurg_shared_experts.py`, which imports torch."""

Entries = Mapping[str, Entry]
"""What gate, up and down are stored as."""
Moves = list[tuple[Region, list[Region]]]
"""What is read with everywhere its bytes go."""
WHOLE: dict[str, Any] = {"form": "whole"}
LOAD = "load it with trust_remote_code=True: AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)"


def check(model: Model, layer: Layer, form: str) -> None:
    """Refuse experts that the model code cannot stand for.

    Raises:
        InputError: they have biases, are called in another way than by index, or are stored in several types.
    """
    experts = mixture(layer)
    if experts.layout.parts != PROJECTIONS or experts.stock.call != "routed":
        raise InputError(
            f"{model.folder}: --form {form} replaces experts that are three matrices without biases, called by "
            f"index; those of {model.family.model_type} are not",
            hint="use --form dense",
        )
    check_expert_types(model, layer)


def module(experts: Experts, part: str) -> str:
    """The name of what holds one projection of a layer's experts."""
    return f"{experts.prefix}{experts.stock.modules[1]}.{part}"


def projection(experts: Experts, part: str, entry: Entry) -> list[Leaf]:
    """The tensors of one projection, named below its module."""
    rows, columns = experts.region(0, part).shape
    return expert_leaves(entry, experts.count, (rows, columns))


def place(experts: Experts, part: str, expert: int, leaf: Leaf) -> Region:
    """One expert's share of a stacked tensor."""
    name, _, (_, *shape) = leaf
    count = 1
    for length in shape:
        count *= length
    return Region(f"{module(experts, part)}.{name}", tuple(shape), expert * count)


def specs(model: Model, layer: Layer, entries: Entries) -> Iterator[TensorSpec]:
    """All tensors of a layer's mixture."""
    experts = mixture(layer)
    for before, after in _routing(experts):
        shape = model.whole(before.tensor).shape
        yield TensorSpec(after.tensor, model.dtype(before.tensor), shape)
    for part in PROJECTIONS:
        dtype = model.dtype(experts.region(0, part).tensor)
        for name, kind, shape in projection(experts, part, entries[part]):
            yield TensorSpec(f"{module(experts, part)}.{name}", kind or dtype, shape)


def moves(layer: Layer, entries: Entries) -> Moves:
    """What of a layer's mixture keeps its bytes: the routing and matrices that stay whole."""
    experts = mixture(layer)
    found: Moves = [
        (before, [Region(after.tensor, before.shape)]) for before, after in _routing(experts)
    ]
    for part in PROJECTIONS:
        if entries[part]["form"] == "whole":
            (leaf,) = projection(experts, part, WHOLE)
            found.extend(
                (experts.region(expert, part), [place(experts, part, expert, leaf)])
                for expert in range(experts.count)
            )
    return found


def untouched(model: Model, layer: Layer) -> tuple[list[TensorSpec], Moves]:
    """A layer's mixture as it was, under the names of the stock modules."""
    experts = mixture(layer)
    if experts.layout == experts.stock:
        here = [model.whole(name) for name in experts.names]
        kept = [
            TensorSpec(region.tensor, model.dtype(region.tensor), region.shape) for region in here
        ]
        return kept, [(region, [region]) for region in here]
    count = experts.count
    stored = Stored(count, count, count, custom=True)
    found: Moves = [
        (before, [Region(after.tensor, before.shape)]) for before, after in _routing(experts)
    ]
    output = stored.experts(experts)
    for expert in range(count):
        written = output.regions(expert)
        found.extend((read, [written[part]]) for part, read in experts.regions(expert).items())
    return list(stored.specs(model, experts)), found


def config(model: Model, layers: Mapping[int, Entries]) -> dict[str, Any]:
    """The part's value in the config."""
    return {
        "experts": mixture(model.moe_layers[0]).stock.modules[1],
        "layers": {
            str(index): {part: dict(entries[part]) for part in PROJECTIONS}
            for index, entries in sorted(layers.items())
        },
    }


def _routing(experts: Experts) -> Iterator[tuple[Region, Region]]:
    """The router and its biases: where they lie, and where the output keeps them."""
    count = experts.count
    routed = Stored(count, count, count, custom=True).routing(experts)
    return zip(experts.routing, routed.routing, strict=True)
