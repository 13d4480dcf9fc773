"""Plans as data: every output tensor and every unit of work, decided from headers alone, without torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

from .checkpoint.dtypes import BITS, nbytes
from .checkpoint.formats import FORMATS, MODEL
from .checkpoint.layout import Shard, TensorSpec, index_json, lay_out
from .checkpoint.reader import Checkpoint
from .checkpoint.region import Region
from .checkpoint.torch_archive import most_bytes
from .errors import InputError, MoesurgError

Kind = Literal["copy", "transform"]
Data = bytes
"""Contents of a file, by another name for classes that have a property ``bytes``."""
COPY_BUFFER = 4 << 20
"""Bytes a copy holds at a time."""


@dataclass(frozen=True)
class Move:
    """Bytes that go unchanged from one place to one or several."""

    read: Region
    writes: tuple[Region, ...]


@dataclass(frozen=True)
class Unit:
    """A piece of work that needs nothing from other units.

    Attributes:
        id: unique in the plan; also the journal's key.
        kind: ``copy`` moves bytes; ``transform`` calls the method.
        layer: the decoder layer it belongs to, or None.
        moves: of a copy.
        reads: regions a transform may read (those it does read can depend on the decisions).
        writes: regions a transform writes, all of them.
        params: the method's own parameters, JSON values only.
        memory: bytes it holds at its peak.
        steps: of a long transform: how often it calls ``work.step()``, so that a person sees it go on.
    """

    id: str
    kind: Kind
    layer: int | None = None
    moves: tuple[Move, ...] = ()
    reads: tuple[Region, ...] = ()
    writes: tuple[Region, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    memory: int = COPY_BUFFER
    steps: int = 0

    def written(self) -> list[Region]:
        return [region for move in self.moves for region in move.writes] + list(self.writes)

    def read_regions(self) -> list[Region]:
        return [move.read for move in self.moves] + list(self.reads)

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.id,
            "kind": self.kind,
            "layer": self.layer,
            "moves": [
                [move.read.to_json(), [region.to_json() for region in move.writes]]
                for move in self.moves
            ],
            "reads": [region.to_json() for region in self.reads],
            "writes": [region.to_json() for region in self.writes],
            "params": dict(self.params),
            "memory": self.memory,
            "steps": self.steps,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Unit:
        return Unit(
            id=data["id"],
            kind=data["kind"],
            layer=data["layer"],
            moves=tuple(
                Move(Region.from_json(read), tuple(Region.from_json(item) for item in writes))
                for read, writes in data["moves"]
            ),
            reads=tuple(Region.from_json(item) for item in data["reads"]),
            writes=tuple(Region.from_json(item) for item in data["writes"]),
            params=data["params"],
            memory=data["memory"],
            steps=data["steps"],
        )


def copy_unit(
    name: str, moves: Sequence[tuple[Region, Sequence[Region]]], *, layer: int | None = None
) -> Unit:
    """A unit that moves bytes; ``moves`` pairs what is read with everywhere it goes."""
    return Unit(
        name, "copy", layer, moves=tuple(Move(read, tuple(writes)) for read, writes in moves)
    )


@dataclass(frozen=True)
class Plan:
    """Everything a run will do.

    Attributes:
        command, method, options, seed: what was asked.
        sources: the input folders, those that are only read beside the given ones last.
        tensors: every output tensor in shard-filling order.
        units: the work.
        max_shard_bytes: how shards are cut.
        statistics: folder of the statistics, relative to the staging folder or absolute; empty for none.
        format: name of the output's format.
        archives: files of the output made after the units, each with the tensors of one of its shards in the format
            that torch loads: (file, shard), both by their names in the output.
        references: how many sources are not what the method starts from, but something that its units read as well.
    """

    command: str
    method: str
    options: Mapping[str, object]
    seed: int
    sources: tuple[str, ...]
    tensors: tuple[TensorSpec, ...]
    units: tuple[Unit, ...]
    max_shard_bytes: int
    statistics: str = ""
    format: str = MODEL.name
    archives: tuple[tuple[str, str], ...] = ()
    references: int = 0

    @property
    def disk_bytes(self) -> int:
        """Bytes that the tensors need on the disk, those that are stored twice counted twice; an upper bound."""
        if not self.archives:
            return self.bytes
        specs = {spec.name: spec for spec in self.tensors}
        shards = {shard.file: shard for shard in self.shards}
        twice = [specs[name] for _, shard in self.archives for name in shards[shard].begin]
        return self.bytes + most_bytes(twice)

    @property
    def bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(spec.nbytes for spec in self.tensors)

    @cached_property
    def shards(self) -> list[Shard]:
        """The output's files; a format that is read from one file gets one whatever its size."""
        found = FORMATS[self.format]
        limit = self.max_shard_bytes if found.sharded else max(1, self.bytes)
        if found.member is None:
            return lay_out(self.tensors, max_shard_bytes=limit, stem=found.stem)
        shards: list[Shard] = []
        for folder, specs in self._folders().items():
            if not folder:
                shards.extend(lay_out(specs, stem="shared"))
                continue
            inner = found.of(folder)
            size = limit if inner.sharded else max(1, self.bytes)
            for shard in lay_out(specs, max_shard_bytes=size, stem=inner.stem):
                begin = {f"{folder}/{name}": offset for name, offset in shard.begin.items()}
                shards.append(Shard(f"{folder}/{shard.file}", shard.header, begin, shard.size))
        return shards

    def indexes(self) -> dict[str, Data]:
        """The index of every folder whose tensors lie in several files, by its path in the output."""
        found: dict[str, list[Shard]] = {}
        for shard in self.shards:
            folder, _, _ = shard.file.rpartition("/")
            found.setdefault(folder, []).append(shard)
        form = FORMATS[self.format]
        return {
            f"{folder}/{form.of(folder).index}" if folder else form.index: index_json(
                shards, f"{folder}/" if folder else ""
            )
            for folder, shards in found.items()
            if len(shards) > 1
        }

    def _folders(self) -> dict[str, list[TensorSpec]]:
        """The tensors of a shelf by folder, under the names they have in it; those of no folder below ``""``."""
        found: dict[str, list[TensorSpec]] = {}
        for spec in self.tensors:
            folder, slash, name = spec.name.partition("/")
            if not slash:
                folder, name = "", spec.name
            found.setdefault(folder, []).append(TensorSpec(name, spec.dtype, spec.shape))
        return found

    @property
    def unchanged(self) -> int:
        """Tensors that are copied whole under their own name."""
        moves = [move for unit in self.units for move in unit.moves]
        return sum(
            len(move.writes) == 1
            and move.writes[0].tensor == move.read.tensor
            and move.writes[0].shape == move.read.shape
            for move in moves
        )

    @property
    def digest(self) -> str:
        """SHA-256 of what the run makes, wherever its sources and statistics lie."""
        made = replace(self, sources=(), statistics="")
        return sha256(made.to_json().encode()).hexdigest()

    @property
    def memory(self) -> int:
        """Bytes the hungriest unit holds."""
        return max((unit.memory for unit in self.units), default=0)

    def to_json(self) -> str:
        document = {
            "schema_version": 1,
            "command": self.command,
            "method": self.method,
            "options": dict(self.options),
            "seed": self.seed,
            "sources": list(self.sources),
            "max_shard_bytes": self.max_shard_bytes,
            "statistics": self.statistics,
            "format": self.format,
            "references": self.references,
            "archives": [list(pair) for pair in self.archives],
            "tensors": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.tensors],
            "units": [unit.to_json() for unit in self.units],
        }
        return json.dumps(document, separators=(",", ":"), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        data = json.loads(text)
        return Plan(
            command=data["command"],
            method=data["method"],
            options=data["options"],
            seed=data["seed"],
            sources=tuple(data["sources"]),
            tensors=tuple(
                TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in data["tensors"]
            ),
            units=tuple(Unit.from_json(item) for item in data["units"]),
            max_shard_bytes=data["max_shard_bytes"],
            statistics=data["statistics"],
            format=data["format"],
            references=data["references"],
            archives=tuple((file, shard) for file, shard in data["archives"]),
        )


def validate(plan: Plan, checkpoints: Sequence[Checkpoint]) -> None:
    """Check that units read what exists and write every output element exactly once.

    A violation is a defect of a method, found before a weight is read rather than in the output.

    Raises:
        MoesurgError: naming unit and tensor.
        InputError: a source tensor is missing.
    """
    specs = {spec.name: spec for spec in plan.tensors}
    if len(specs) != len(plan.tensors):
        raise MoesurgError("the plan names an output tensor twice")
    if len({unit.id for unit in plan.units}) != len(plan.units):
        raise MoesurgError("the plan names a unit twice")
    if plan.archives:
        files = {shard.file for shard in plan.shards}
        for file, shard in plan.archives:
            if shard not in files or file in files:
                raise MoesurgError(f"the plan makes {file} of {shard}, which is no shard")
    covered: dict[str, list[Region]] = {}
    for unit in plan.units:
        for region in unit.read_regions():
            tensors = checkpoints[region.source].tensors
            if region.tensor not in tensors:
                raise InputError(
                    f"{checkpoints[region.source].folder}: tensor {region.tensor!r} is missing"
                )
            _in_bounds(unit, region, tensors[region.tensor].shape)
        for move in unit.moves:
            stored = checkpoints[move.read.source].tensors[move.read.tensor]
            for region in move.writes:
                if region.tensor in specs and (
                    specs[region.tensor].dtype != stored.dtype or region.count != move.read.count
                ):
                    raise MoesurgError(f"unit {unit.id}: copies {move.read} into {region}")
        for region in unit.written():
            if region.tensor not in specs:
                raise MoesurgError(f"unit {unit.id}: writes unplanned tensor {region.tensor!r}")
            _in_bounds(unit, region, specs[region.tensor].shape)
            covered.setdefault(region.tensor, []).append(region)
    for name, spec in specs.items():
        regions = covered.get(name, [])
        size = Region(name, spec.shape).count
        if sum(region.count for region in regions) != size or _overlap(regions):
            raise MoesurgError(f"the plan does not write tensor {name!r} exactly once")


def _in_bounds(unit: Unit, region: Region, shape: tuple[int, ...]) -> None:
    first, count = region.span()
    if first < 0 or first + count > Region(region.tensor, shape).count:
        raise MoesurgError(f"unit {unit.id}: {region} lies outside its tensor of shape {shape}")


def _overlap(regions: Sequence[Region]) -> bool:
    """Whether contiguous windows overlap; strided ones interleave by design and are counted only."""
    spans = sorted(region.span() for region in regions if region.contiguous and region.count)
    return any(before + count > after for (before, count), (after, _) in itertools.pairwise(spans))


def element_bytes(dtype: str) -> int:
    """Bytes of one element of a whole-byte type."""
    return BITS[dtype] // 8


def float32_bytes(region: Region) -> int:
    """Bytes of a region once it is converted to float32."""
    return nbytes("F32", region.shape)
