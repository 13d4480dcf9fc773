"""What every method that changes how many experts a mixture has needs of a plan: the rest of the model, unchanged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from ..architectures.base import PROJECTIONS
from ..checkpoint.layout import TensorSpec
from ..checkpoint.region import Region
from ..errors import InputError
from ..plan import Unit, copy_unit

if TYPE_CHECKING:
    from ..architectures.model import Experts, Layer, Model


def one_mixture(models: Sequence[Model], doing: str, done: str) -> Model:
    """The only input, checked to have experts.

    Args:
        doing, done: the verb in an error, such as ``pruning`` and ``prune``.
    """
    if len(models) != 1:
        raise InputError(f"{doing} experts takes one mixture of experts, {len(models)} were given")
    model = models[0]
    if not model.is_moe or not model.moe_layers:
        raise InputError(
            f"{model.folder}: {model.family.model_type} has no experts to {done}",
            hint="grow experts first: moesurg upcycle",
        )
    return model


def mixture(layer: Layer) -> Experts:
    """The experts of a layer that has some."""
    if layer.experts is None:
        raise InputError(f"layer {layer.index} has no experts")
    return layer.experts


def blocks(experts: Experts, expert: int) -> list[Region]:
    """Everything of one expert as contiguous stored blocks, however its projections lie inside them."""
    layout = experts.layout
    if layout.kind == "per-expert":
        return list(experts.regions(expert).values())
    counted = layout.routing_shapes(experts.count, experts.hidden)
    shapes = layout.shapes(experts.count, experts.hidden, experts.width)
    return [
        Region(experts.prefix + name, shape).rows(expert, expert + 1)
        for name, shape in shapes.items()
        if name not in counted
    ]


def check_expert_types(model: Model, layer: Layer) -> None:
    """Refuse experts stored in several types, of which an average would have to choose one.

    Raises:
        InputError: naming the first that differs.
    """
    experts = mixture(layer)
    stored = model.dtype(experts.region(0, "gate").tensor)
    for expert in range(experts.count):
        for part, region in experts.regions(expert).items():
            if part in PROJECTIONS and model.dtype(region.tensor) != stored:
                raise InputError(
                    f"{model.folder}: layer {layer.index}: expert {expert}'s {part} is stored as "
                    f"{model.dtype(region.tensor)}, others as {stored}; experts of mixed types "
                    "cannot be averaged without choosing one"
                )


def replaced(
    model: Model,
    specs: Callable[[Layer], Iterable[TensorSpec]],
    units: Callable[[Layer], Iterable[Unit]],
    *,
    without: Collection[str] = (),
) -> tuple[list[TensorSpec], list[Unit]]:
    """Tensors and units of the model with its mixtures replaced and everything else copied.

    Args:
        specs: the tensors of a layer's new mixture, which stand where the old mixture's first tensor stood.
        units: the units that write them.
        without: names of further tensors that the output lacks.
    """
    tensors: list[TensorSpec] = []
    work: list[Unit] = []
    mixtures = {name: layer for layer in model.moe_layers for name in mixture(layer).names}
    owner = {name: layer.index for layer in model.layers for name in layer.names}
    planned: set[int] = set()
    passing: dict[int | None, list[str]] = {}
    for name in model.names():
        if name in without:
            continue
        if name not in mixtures:
            shape = model.checkpoint.tensors[name].shape
            tensors.append(TensorSpec(name, model.dtype(name), shape))
            passing.setdefault(owner.get(name), []).append(name)
            continue
        layer = mixtures[name]
        if layer.index not in planned:
            planned.add(layer.index)
            tensors.extend(specs(layer))
            work.extend(units(layer))
    for index, names in passing.items():
        label = "outer" if index is None else f"layer.{index}"
        moves = [(model.whole(name), [model.whole(name)]) for name in names]
        work.append(copy_unit(f"{label}.unchanged", moves, layer=index))
    work.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    return tensors, work


def recounted(model: Model, count: int) -> dict[str, object]:
    """The config with another number of experts, under every spelling the family's loaders read.

    Raises:
        InputError: the family's classes cannot have another number.
    """
    config = dict(model.config.raw)
    if model.family.moe is not None:
        moe = model.family.moe
        if moe.fixed_count and count != model.experts:
            raise InputError(
                f"{model.folder}: {model.family.model_type} cannot have {count} of its {model.experts} experts in a "
                f"stock checkpoint: {moe.fixed_count}",
                hint="merge --router tied keeps the number, and merges all the same",
            )
        for key in (*moe.expert_keys, *(key for key in moe.other_keys if key in config)):
            config[key] = count
    return config


def reselected(model: Model, config: dict[str, object], top_k: int) -> dict[str, object]:
    """The config with another number of experts that a token selects.

    Raises:
        InputError: the family's classes select a number of their own.
    """
    if model.rule.top_k == top_k or model.family.moe is None:
        return config
    if model.rule.score == "sparsemixer":
        raise InputError(f"{model.folder}: tokens of {model.family.model_type} always select two")
    own, *others = model.family.moe.top_k_keys
    found = config.get(own)
    # HunYuan's may be a list, one number a layer.
    changed: object = [top_k] * len(found) if isinstance(found, list) else top_k
    return {**config, own: changed, **{key: top_k for key in others if key in config}}


def prediction_notes(model: Model) -> list[str]:
    """What a report says of layers that predict further tokens, which pass through with all their experts."""
    extra = model.prediction_names()
    if not extra:
        return []
    return [
        f"{len(extra)} tensors of layers after the last, which predict further tokens, are kept as they are; a "
        "loader that uses them needs all of the original experts in them"
    ]
