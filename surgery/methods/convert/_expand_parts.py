"""Matrices that `compress` stored as parts, as the stock class's: those of linear layers, and those of experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...architectures.config import Config
from ...architectures.model import layer_shapes
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from ..compress._entries import LOWRANK, MATRIX, Entry, Leaf, expert_leaves, leaves
from ._expand import Piece, layer_of, stored

if TYPE_CHECKING:
    from ...architectures.layouts import ExpertLayout
    from ...custom import CustomModel

SHARING = ("whole", "input", "output", "delta", "bases")
"""Forms that only experts have."""
OF_ALL = {
    ("delta", "base"),
    ("bases", "bases"),
    *(("bases", name) for name in ("left", "right", "pivots")),
}
"""Tensors by form that belong to all experts of a layer."""


def linears(model: CustomModel, entry: Mapping[str, Any]) -> Iterator[Piece]:
    """Linear layers of low rank (`modeling/moesurg_linears.py`)."""
    return _layers(model, entry, LOWRANK)


def mixed(model: CustomModel, entry: Mapping[str, Any]) -> Iterator[Piece]:
    """Linear layers of several parts (`modeling/moesurg_mixed_linears.py`)."""
    return _layers(model, entry, tuple(form for form in MATRIX if form not in LOWRANK))


def _layers(
    model: CustomModel, entry: Mapping[str, Any], forms: tuple[str, ...]
) -> Iterator[Piece]:
    body = model.family.embedding.partition(".")[0]
    for name, listed in entry.items():
        facts = _known(model, name, listed, forms)
        index, weight = layer_of(name), f"{body}.{name}.weight"
        shape = _stock_shapes(model, index).get(weight, ())
        if len(shape) != 2:
            raise InputError(
                f"{model.folder / 'config.json'}: {name} is no linear layer of a decoder layer of "
                f"{model.family.class_name}"
            )
        rows, columns = shape
        module = f"{body}.{name}"
        if facts["form"] not in LOWRANK and f"{module}.bias" in model.checkpoint.tensors:
            module += ".layer"
        found = _sizes(model, name, lambda: leaves(facts, (rows, columns)))  # noqa: B023
        reads = _checked(model, module, found)
        unit = Unit(
            name,
            "transform",
            index,
            reads=tuple(reads.values()),
            writes=(Region(weight, shape),),
            params={"form": "entry", "entry": dict(facts), "leaves": list(reads)},
            memory=32 * rows * columns,
        )
        dtype = _dtype(model, reads)
        names = tuple(read.tensor for read in reads.values())
        yield Piece(names, (TensorSpec(weight, dtype, shape),), (unit,))


def experts(model: CustomModel, entry: Mapping[str, Any]) -> Iterator[Piece]:
    """Experts of parts (`modeling/moesurg_shared_experts.py`) as the stock class's fused tensors."""
    moe = model.family.moe
    if moe is None or moe.stock.modules[1] != entry.get("experts"):
        raise InputError(
            f"{model.folder}: its config names no experts of {model.family.class_name}"
        )
    config = _config(model)
    count, hidden, width = moe.experts(config), config.hidden, config.integer(moe.width_key)
    listed = entry.get("layers")
    if not isinstance(listed, Mapping):
        raise InputError(f"{model.folder / 'config.json'}: its experts list no layers")
    for index, parts in listed.items():
        prefix = model.family.prefix.format(layer=index)
        units: list[Unit] = []
        names: dict[str, None] = {}
        dtype = ""
        for part in PROJECTIONS:
            given = parts.get(part) if isinstance(parts, Mapping) else None
            label = f"layer {index}: {part}"
            facts = _known(model, label, given, (*MATRIX, *SHARING))
            shape = (hidden, width) if part == "down" else (width, hidden)
            found = _sizes(model, label, lambda: expert_leaves(facts, count, shape))  # noqa: B023
            reads = _checked(model, f"{prefix}{entry['experts']}.{part}", found)
            names.update(dict.fromkeys(read.tensor for read in reads.values()))
            dtype = dtype or _dtype(model, reads)
            units.extend(
                _unit(
                    moe.stock,
                    int(index),
                    prefix,
                    expert,
                    part,
                    facts,
                    reads,
                    (count, hidden, width),
                )
                for expert in range(count)
            )
        routing = moe.stock.routing_shapes(count, hidden)
        specs = tuple(
            TensorSpec(prefix + name, dtype, shape)
            for name, shape in moe.stock.shapes(count, hidden, width).items()
            if name not in routing
        )
        yield Piece(tuple(names), specs, tuple(units))


def _unit(
    layout: ExpertLayout,
    index: int,
    prefix: str,
    expert: int,
    part: str,
    entry: Entry,
    reads: Mapping[str, Region],
    sizes: tuple[int, int, int],
) -> Unit:
    count, hidden, width = sizes
    own: dict[str, Region] = {}
    for leaf, whole in reads.items():
        own[leaf] = whole
        if (entry["form"], leaf) not in OF_ALL:
            # Groups are of consecutive experts and of one size.
            place = expert * whole.shape[0] // count
            row = whole.rows(place, place + 1)
            own[leaf] = Region(row.tensor, row.shape[1:], row.offset)
    return Unit(
        f"layer.{index}.expert.{expert}.{part}",
        "transform",
        index,
        reads=tuple(own.values()),
        writes=(layout.region(prefix, expert, part, hidden, width),),
        params={"form": "entry", "entry": dict(entry), "leaves": list(own)},
        memory=40 * hidden * width + 12 * sum(region.count for region in own.values()),
    )


def _known(model: CustomModel, name: str, facts: object, forms: tuple[str, ...]) -> Entry:
    """An entry of a config, which has to have one of some forms."""
    form = facts.get("form") if isinstance(facts, Mapping) else None
    if form not in forms or not isinstance(facts, Mapping):
        raise InputError(f"{model.folder / 'config.json'}: {name} has the unknown form {form!r}")
    return facts


def _sizes(model: CustomModel, name: str, listed: Any) -> list[Leaf]:
    """The tensors of an entry that came from a config.

    Raises:
        InputError: a size is missing or is no positive number.
    """
    try:
        found: list[Leaf] = listed()
        if all(size >= 0 for _, _, shape in found for size in shape):
            return found
        reason = "a size below 0"
    except (KeyError, TypeError, ZeroDivisionError) as error:
        reason = str(error)
    raise InputError(f"{model.folder / 'config.json'}: {name} has impossible sizes ({reason})")


def _checked(model: CustomModel, module: str, found: list[Leaf]) -> dict[str, Region]:
    """The stored tensors by name below their module, checked to have the shapes they should."""
    reads: dict[str, Region] = {}
    for leaf, kind, shape in found:
        region = stored(model, f"{module}.{leaf}", axes=len(shape))
        held = model.checkpoint.tensors[region.tensor].dtype
        if region.shape != shape or (kind and held != kind):
            raise InputError(
                f"{model.folder}: tensor {region.tensor!r} is {held} {list(region.shape)}, the config says "
                f"{kind or held} {list(shape)}"
            )
        reads[leaf] = region
    return reads


def _dtype(model: CustomModel, reads: Mapping[str, Region]) -> str:
    """The type of the parts that are no integers."""
    kinds = [model.checkpoint.tensors[read.tensor].dtype for read in reads.values()]
    return next(kind for kind in kinds if kind not in ("I32", "U8"))


def _config(model: CustomModel) -> Config:
    where = str(model.folder / "config.json")
    return Config(model.stock_config, model.family.defaults, where)


def _stock_shapes(model: CustomModel, index: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of the stock class's tensors of one layer, by name; empty where there is no such layer."""
    config, family = _config(model), model.family
    if index is None or index >= config.layers:
        return {}
    layout = None if family.moe is None else family.moe.stock
    prefix = family.prefix.format(layer=index)
    shapes = layer_shapes(family, config, layout, index)
    return {prefix + name: shape for name, shape in shapes.items()}
