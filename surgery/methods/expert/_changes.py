"""Experts as one base and changes of low rank: where these are stored, and the units that write them.

Of every expert of a layer there is a rank: 0 stores nothing but the base, `FULL` the expert as it is. A ``base`` of
None is the mean of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...plan import Unit, copy_unit
from .._mixture import mixture
from ._own import routing_specs, routing_unit
from ._slots import moves

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Layer, Model
    from ...execute import Work

FULL = -1
"""The same as in `modeling/moesurg_lowrank_experts.py`, which imports torch."""


def _place(layer: Layer, expert: int | str) -> str:
    return f"{layer.prefix}{mixture(layer).stock.modules[1]}.{expert}."


def _factors(layer: Layer, expert: int, part: str, rank: int) -> tuple[Region, Region]:
    outputs, inputs = mixture(layer).region(0, part).shape
    name = f"{_place(layer, expert)}{part}_proj"
    return Region(f"{name}_a.weight", (rank, inputs)), Region(f"{name}_b.weight", (outputs, rank))


def _whole(layer: Layer, expert: int | str, part: str) -> Region:
    name = f"{_place(layer, expert)}{part}_proj.weight"
    return Region(name, mixture(layer).region(0, part).shape)


def _written(layer: Layer, ranks: Sequence[int], base: int | None) -> Iterator[tuple[Region, int]]:
    """Every region of a layer's experts with the expert whose type it is stored in."""
    for part in PROJECTIONS:
        yield _whole(layer, "base", part), base or 0
    for expert, rank in enumerate(ranks):
        for part in PROJECTIONS:
            if rank == FULL:
                yield _whole(layer, expert, part), expert
            elif rank:
                for region in _factors(layer, expert, part, rank):
                    yield region, expert


def specs(
    model: Model, layer: Layer, ranks: Sequence[int], base: int | None
) -> Iterator[TensorSpec]:
    """The tensors of a layer's mixture in the form ``factors``."""
    yield from routing_specs(model, layer)
    experts = mixture(layer)
    for region, expert in _written(layer, ranks, base):
        part = region.tensor.rpartition("_proj")[0].rpartition(".")[2]
        kind = model.dtype(experts.region(expert, part).tensor)
        yield TensorSpec(region.tensor, kind, region.shape)


def units(layer: Layer, ranks: Sequence[int], base: int | None) -> Iterator[Unit]:
    """What writes them: a unit a matrix."""
    experts = mixture(layer)
    yield routing_unit(layer)
    for part in PROJECTIONS:
        target = _whole(layer, "base", part)
        yield _unit(layer, f"base.{part}", "base", [part], None, base, [target])
    for expert, rank in enumerate(ranks):
        for part in PROJECTIONS:
            label, parts = f"expert.{expert}.{part}", [part]
            if rank == FULL:
                yield copy_unit(
                    f"layer.{layer.index}.{label}",
                    [(experts.region(expert, part), [_whole(layer, expert, part)])],
                    layer=layer.index,
                )
            elif rank:
                writes = _factors(layer, expert, part, rank)
                yield _unit(layer, label, "factors", parts, expert, base, writes, rank)


def dense_units(layer: Layer, ranks: Sequence[int], base: int | None) -> Iterator[Unit]:
    """What writes the experts multiplied out: a unit an expert, bytes of those that stay."""
    experts = mixture(layer)
    kept = [expert if rank == FULL or expert == base else None for expert, rank in enumerate(ranks)]
    yield from moves(layer, kept, routed=0)
    found = [(region, [region]) for region in experts.routing]
    yield copy_unit(f"layer.{layer.index}.router", found, layer=layer.index)
    for expert, rank in enumerate(ranks):
        if kept[expert] is None:
            # One unit for all: parts may lie between each other in one stored tensor.
            writes = list(experts.regions(expert).values())
            parts = list(PROJECTIONS)
            yield _unit(layer, f"expert.{expert}", "dense", parts, expert, base, writes, rank)


def _unit(
    layer: Layer,
    label: str,
    kind: str,
    parts: Sequence[str],
    expert: int | None,
    base: int | None,
    writes: Sequence[Region],
    rank: int = 0,
) -> Unit:
    """Writes ``parts`` of an expert, or of the base where ``expert`` is None."""
    experts = mixture(layer)
    bases = range(experts.count) if base is None else [base]
    reads = [
        experts.region(number, part)
        for part in parts
        for number in (*bases, *([] if expert is None else [expert]))
    ]
    return Unit(
        f"layer.{layer.index}.{label}",
        "transform",
        layer.index,
        reads=tuple(reads),
        writes=tuple(writes),
        params={"kind": kind, "rank": rank, "bases": len(bases)},
        memory=64 * experts.hidden * experts.width + 24 * min(experts.hidden, experts.width) ** 2,
    )


def transform(work: Work) -> dict[str, object]:
    """Write the base, or matrices of an expert as the base and a change of low rank."""
    from ...linalg.lowrank import truncate

    rank, kind, writes = work.params["rank"], work.params["kind"], list(work.unit.writes)
    lost = whole = 0.0
    for bases, own in _grouped(work):
        base = _mean(work, bases)
        if own is None:
            work.write(writes.pop(0), base)
            continue
        change = work.read(own).double() - base
        squares = float(change.square().sum())
        whole += squares
        if rank == 0:
            lost += squares
            work.write(writes.pop(0), base)
            continue
        found = truncate(change, rank)
        lost += found.error**2
        if kind == "dense":
            work.write(writes.pop(0), base + found.product())
        else:
            left, right = found.balanced()
            work.write(writes.pop(0), right)
            work.write(writes.pop(0), left)
    for region in writes:  # biases, which stay
        work.write(region, work.read(region))
    if kind == "base":
        return {}
    return {"change": whole**0.5, "relative_error": (lost / whole) ** 0.5 if whole else 0.0}


def _grouped(work: Work) -> Iterator[tuple[Sequence[Region], Region | None]]:
    """Of each matrix the regions whose mean is the base, and the expert's own, if it has one."""
    bases, kind = work.params["bases"], work.params["kind"]
    step = bases if kind == "base" else bases + 1
    reads = work.unit.reads
    for start in range(0, len(reads), step):
        group = reads[start : start + step]
        yield group[:bases], None if kind == "base" else group[-1]


def _mean(work: Work, regions: Sequence[Region]) -> torch.Tensor:
    """The mean of matrices, summed in float64."""
    total = work.read(regions[0]).double()
    for region in regions[1:]:
        total += work.read(region)
    return total / len(regions)
