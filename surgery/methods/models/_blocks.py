"""A unit of a merge of models: the sources' tensor in blocks of rows.

A tensor is read once or, where the rule has to know something of the whole tensor first, several times, so that a
unit's memory is that of a block. Sums are in float64 where a source stores 32 bits or more, in float32 otherwise, and
are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...checkpoint.region import Region
from ...errors import InputError

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work
    from ...linalg.selection import Cut

KEPT = 1 << 20
"""Elements of a tensor up to which its blocks are kept."""
RUNS, RUN = 64, 256
"""Of a tensor of several blocks: pieces that are read for a sample, and elements of each."""
SLACK = 0.02
"""What neighbours that are alike may add to the error of a rank in such a sample, as a share of all values."""


@dataclass(frozen=True)
class Block:
    """One run of rows of a tensor.

    Attributes:
        index: which.
        target: what it writes.
        base: the first source's values, where the method has a base.
        tensors: the changes from the base, or the values themselves; one a model.
    """

    index: int
    target: Region
    base: torch.Tensor | None
    tensors: list[torch.Tensor]


def sum_type(models: Sequence[Model], tensor: str) -> torch.dtype:
    """In which a tensor is merged: float64 where a source stores 32 bits or more, else float32."""
    import torch

    stored = {model.dtype(tensor) for model in models}
    return torch.float64 if stored & {"F32", "F64"} else torch.float32


class Blocks:
    """The blocks of a unit's tensor. Every loop reads them anew; those of a small tensor are kept.

    Args:
        based: whether the first source is the base of the others.
        once: whether there is a single loop, so that keeping is of no use.
    """

    def __init__(self, work: Work, *, based: bool, once: bool = False) -> None:
        self._work, self._based = work, based
        self.dtype = sum_type(work.models, work.unit.writes[0].tensor)
        self.keeps = not once and self.count <= KEPT
        self._kept: list[Block] = []

    def __iter__(self) -> Iterator[Block]:
        regions = self._work.unit.writes
        if len(self._kept) == len(regions):
            yield from self._kept
            return
        self._kept = []
        for index, region in enumerate(regions):
            block = self._read(index, region)
            if self.keeps:
                self._kept.append(block)
            yield block

    def values(
        self, function: Callable[[Block], torch.Tensor]
    ) -> Callable[[], Iterator[torch.Tensor]]:
        """A function of every block, computed anew whenever it is looped over."""
        return lambda: (function(block) for block in self)

    def changes(self, source: int) -> Iterator[torch.Tensor]:
        """The blocks of one source's change; the others are not read."""
        if self.keeps:
            yield from (block.tensors[source] for block in self)
            return
        for region in self._work.unit.writes:
            base, tuned = (
                self._work.read(replace(region, source=index)).to(self.dtype)
                for index in (0, source + 1)
            )
            yield tuned.sub_(base)

    def samples(self) -> tuple[list[torch.Tensor], float]:
        """Some values of every source's change, from all parts of the tensor, and the slack that they need."""
        import torch

        from ...linalg.selection import SAMPLE, sample_of

        if self.keeps:
            each = zip(*(block.tensors for block in self), strict=True)
            # Every block gives its share of a sample.
            size = max(1, SAMPLE // len(self._work.unit.writes))
            return [torch.cat([sample_of(part, size) for part in parts]) for parts in each], 0.0
        runs = []
        for region in runs_of(self._work.unit.writes[0].tensor, self.count, RUNS):
            base, *tuned = self.read(region)
            runs.append([one.sub_(base) for one in tuned])
        return [torch.cat(one) for one in zip(*runs, strict=True)], SLACK

    @property
    def count(self) -> int:
        """Elements of the tensor."""
        return sum(region.count for region in self._work.unit.writes)

    def read(self, region: Region) -> list[torch.Tensor]:
        """A region of every source."""
        return [
            self._work.read(replace(region, source=source)).to(self.dtype)
            for source in range(len(self._work.models))
        ]

    def _read(self, index: int, region: Region) -> Block:
        found = self.read(region)
        base = found.pop(0) if self._based else None
        if base is not None:
            found = [tensor.sub_(base) for tensor in found]
        return Block(index, region, base, found)


def runs_of(tensor: str, count: int, number: int) -> list[Region]:
    """Runs of neighbouring elements from all parts of a tensor of ``count``."""
    length = min(RUN, count)
    found = []
    for index in range(number):
        # Steps of the golden ratio meet all columns, as even steps may not.
        offset = int((count - length) * (index + 0.5) / number + length * (index * 0.618 % 1))
        found.append(Region(tensor, (length,), min(offset, count - length)))
    return found


def gram(blocks: Blocks) -> torch.Tensor:
    """Inner products of the sources' tensors (or changes), [T, T] float64."""
    import torch

    total: torch.Tensor | None = None
    for block in blocks:
        flat = torch.stack([tensor.reshape(-1) for tensor in block.tensors]).double()
        total = flat @ flat.T if total is None else total + flat @ flat.T
    if total is None:
        raise InputError("a tensor without elements cannot be merged")
    return total


def largest(blocks: Blocks, sources: int, counts: Sequence[int]) -> list[list[Cut]]:
    """Where the largest magnitudes of each source's change end, for several numbers of them: [number][source]."""
    from ...linalg.selection import Bracket, by_buckets, trivial

    samples, slack = blocks.samples()
    brackets: dict[tuple[int, int], Bracket] = {}
    found: dict[tuple[int, int], Cut] = {}
    for place, count in enumerate(counts):
        known = trivial(blocks.count, count)
        for source in range(sources):
            if known is not None:
                found[place, source] = known
            else:
                brackets[place, source] = Bracket(blocks.count, count, samples[source], slack)
    # One pass finds the cuts of all sources, so that the base is read once.
    for block in blocks if brackets else ():
        for (_, source), bracket in brackets.items():
            bracket.add(block.tensors[source])
    for key, bracket in brackets.items():
        place, source = key
        cut = bracket.cut()
        found[key] = cut or by_buckets(
            lambda source=source: blocks.changes(source),  # type: ignore[misc]
            blocks.count,
            counts[place],
        )
    return [[found[place, source] for source in range(sources)] for place in range(len(counts))]


def combine(work: Work, blocks: Blocks, coefficients: Sequence[float], scale: float = 1.0) -> None:
    """Write the combination of the sources, or the base and the combination of the changes."""
    from ...linalg.merge_rules import weighted_sum

    scaled = [coefficient * scale for coefficient in coefficients]
    for block in blocks:
        put(work, block, weighted_sum(block.tensors, scaled))


def put(work: Work, block: Block, merged: torch.Tensor, scale: float = 1.0) -> None:
    """Write a block: the merged tensor, or base plus scale times the merged change."""
    if block.base is not None:
        merged = block.base.add(merged, alpha=scale)
    work.write(block.target, merged)
