"""The k-th largest magnitude of many values that come in blocks, exactly, without keeping them.

Values are finite; their signs do not count. Usually one pass: a small sample tells between which two magnitudes the
k-th lies, and only what lies there is kept; counting what is above tells whether the sample was right. Where it was
not there are two more: the first counts values by the upper half of their float32 pattern, which orders non-negative
numbers as integers; the second keeps the distinct values of the one bucket that holds the k-th. Rounding to float32 is
monotone, so the bucket is right for float64 as well. Memory is a few hundredths of the data, at most `MOST` values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

Blocks = Callable[[], Iterator[torch.Tensor]]
"""Gives the same blocks anew on every call."""


@dataclass(frozen=True)
class Cut:
    """Where the k largest end.

    Attributes:
        value: everything above it is among them.
        equal: how many of the values equal to it are among them, the first in order.
    """

    value: float
    equal: int


NOTHING = Cut(float("inf"), 0)
"""The cut of the zero largest."""


PIECE = 1 << 15
"""Elements looked at together: small enough that what is made of them stays in the processor's cache."""
SAMPLE = 1 << 14
"""Values in a sample of a block."""
MOST = 1 << 22
"""Values that are kept at most between the two magnitudes."""


class Bracket:
    """Finds the k-th largest in one pass, if a sample was right about where it lies.

    Args:
        count: of all values.
        k: 1 to ``count`` - 1.
        sample: of the values, any shape; not empty.
        slack: how far from the sample's, as a share of all values, the true rank may lie beside what chance allows.
    """

    def __init__(self, count: int, k: int, sample: torch.Tensor, slack: float = 0.0) -> None:
        self._k, self._above, self._kept = k, 0, 0
        self._near: list[np.ndarray] = []
        sizes = np.sort(np.abs(sample.detach().reshape(-1).numpy()))[::-1]
        # Two roots of the number are four deviations of the rank at least.
        place, room = k / count * len(sizes), 2 * sqrt(len(sizes)) + slack * len(sizes)
        first, last = int(place - room), int(place + room) + 1
        number = sizes.dtype.type
        few = count <= SAMPLE
        self._high = number(np.inf) if few or first < 0 else sizes[first]
        self._low = number(-1) if few or last >= len(sizes) else sizes[last]

    def add(self, block: torch.Tensor) -> None:
        """Look at further values."""
        if self._kept > MOST:
            return
        flat = block.reshape(-1).numpy()
        room = min(PIECE, len(flat))
        sizes, above, near = (np.empty(room, t) for t in (flat.dtype, np.bool_, np.bool_))
        for start in range(0, len(flat), PIECE):
            part = flat[start : start + PIECE]
            if len(part) < len(sizes):
                sizes, above, near = (buffer[: len(part)] for buffer in (sizes, above, near))
            np.abs(part, out=sizes)
            np.greater(sizes, self._high, out=above)
            np.greater_equal(sizes, self._low, out=near)
            np.logical_xor(near, above, out=near)
            self._above += int(np.count_nonzero(above))
            self._near.append(sizes[near])
            self._kept += len(self._near[-1])

    def cut(self) -> Cut | None:
        """The cut, or None where the k-th lies elsewhere."""
        missing = self._k - self._above
        if self._kept > MOST or not 0 < missing <= self._kept:
            return None
        values = np.concatenate(self._near)
        value = np.partition(values, len(values) - missing)[len(values) - missing]
        return Cut(float(value), missing - int(np.count_nonzero(values > value)))


def sample_of(block: torch.Tensor, size: int = SAMPLE) -> torch.Tensor:
    """About ``size`` values of a block, evenly spread."""
    flat = block.reshape(-1)
    # An odd step meets every column of matrices whose width is a power of two.
    return flat[:: max(1, len(flat) // size) | 1]


def kth_largest(blocks: Blocks, count: int, k: int) -> Cut:
    """The cut that leaves exactly the k largest magnitudes of ``count`` values, ties by position.

    Args:
        blocks: of floating tensors of any shape.
        count: of all values together.
        k: 0 to ``count``.
    """
    found = trivial(count, k)
    if found is None:
        bracket = Bracket(count, k, sample_of(next(blocks())))
        for block in blocks():
            bracket.add(block)
        found = bracket.cut()
    return by_buckets(blocks, count, k) if found is None else found


def trivial(count: int, k: int) -> Cut | None:
    """The cut that needs no look at the values: of none or all of them."""
    if k <= 0:
        return NOTHING
    return Cut(-1.0, 0) if k >= count else None


def by_buckets(blocks: Blocks, count: int, k: int) -> Cut:
    """`kth_largest` in two passes, whatever the values are; ``k`` is 1 to ``count`` - 1."""
    tally = torch.zeros(1 << 16, dtype=torch.int64)
    for block in blocks():
        tally += torch.bincount(_bucket(block), minlength=1 << 16)
    above = tally.flip(0).cumsum(0).flip(0)
    bucket = int((above >= k).nonzero()[-1])
    missing = k - (int(above[bucket + 1]) if bucket + 1 < len(above) else 0)
    values = torch.empty(0, dtype=torch.float64)
    counts = torch.empty(0, dtype=torch.int64)
    for block in blocks():
        inside = block.reshape(-1)[_bucket(block) == bucket].abs().double()
        found, times = torch.unique(inside, return_counts=True)
        values, place = torch.unique(torch.cat([values, found]), return_inverse=True)
        counts = torch.zeros(len(values), dtype=torch.int64).index_add_(
            0, place, torch.cat([counts, times])
        )
    upward = counts.flip(0).cumsum(0)
    position = int((upward >= missing).nonzero()[0])
    before = int(upward[position - 1]) if position else 0
    return Cut(float(values.flip(0)[position]), missing - before)


class Taking:
    """The values above a cut, block after block in order; it counts off the equal ones."""

    def __init__(self, cut: Cut) -> None:
        self._cut, self._equal = cut, cut.equal

    def mask(self, values: torch.Tensor) -> torch.Tensor:
        """Which values of the next block are taken, bool of its shape."""
        sizes = values.abs()
        taken = sizes > self._cut.value
        if self._equal:
            # Most blocks hold few values that equal the cut, so their positions are cheap.
            places = (sizes == self._cut.value).reshape(-1).nonzero().reshape(-1)[: self._equal]
            self._equal -= len(places)
            flat = taken.reshape(-1)
            flat[places] = True
            taken = flat.reshape(values.shape)
        return taken

    def trim_(self, values: torch.Tensor) -> torch.Tensor:
        """Set to zero, in place, what of the next block is not taken; ``values`` is contiguous."""
        cut = self._cut.value
        if cut <= 0:
            # All that is not zero is above the cut.
            return values
        floor = values.new_tensor(cut)
        if float(floor) > cut:
            # A cut that this type does not hold lies between two of its values.
            floor = torch.nextafter(floor, torch.zeros_like(floor))
        for piece in torch.split(values.view(-1), PIECE):
            below = float(floor)
            if self._equal:
                equal = int(np.count_nonzero(np.abs(piece.numpy()) == cut))
                if equal > self._equal:
                    piece.mul_(self.mask(piece))
                    continue
                self._equal -= equal
                below = float(torch.nextafter(piece.new_tensor(cut), piece.new_zeros(())))
            # Keeps what is larger than its threshold; many times faster than a product with a mask.
            piece.copy_(torch.nn.functional.hardshrink(piece, below))
        return values


def _bucket(block: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits of the float32 patterns of the magnitudes, int32 of one dimension."""
    return block.reshape(-1).float().abs().view(torch.int32) >> 16
