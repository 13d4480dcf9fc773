"""The k-th largest of many values that come in blocks, exactly, without keeping them.

Values are non-negative and finite. Two passes for several blocks: the first counts values by the upper half of
their float32 pattern, which orders non-negative numbers as integers; the second keeps the distinct values of the
one bucket that holds the k-th. Rounding to float32 is monotone, so the bucket is right for float64 as well. Memory
is that bucket's distinct values, about one part in a hundred of continuous data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


def kth_largest(blocks: Blocks, count: int, k: int) -> Cut:
    """The cut that leaves exactly the k largest of ``count`` values, ties by position.

    Args:
        blocks: of non-negative floating tensors of any shape.
        count: of all values together.
        k: 0 to ``count``.
    """
    if k <= 0:
        return NOTHING
    if k >= count:
        return Cut(-1.0, 0)
    tally = torch.zeros(1 << 16, dtype=torch.int64)
    for block in blocks():
        tally += torch.bincount(_bucket(block), minlength=1 << 16)
    above = tally.flip(0).cumsum(0).flip(0)
    bucket = int((above >= k).nonzero()[-1])
    missing = k - (int(above[bucket + 1]) if bucket + 1 < len(above) else 0)
    if next(blocks()).numel() == count:
        (inside,) = (block.reshape(-1)[_bucket(block) == bucket] for block in blocks())
        value = float(torch.kthvalue(inside, len(inside) - missing + 1).values)
        return Cut(value, missing - int((inside > value).sum()))
    values = torch.empty(0, dtype=torch.float64)
    counts = torch.empty(0, dtype=torch.int64)
    for block in blocks():
        inside = block.reshape(-1)[_bucket(block) == bucket].double()
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
    """Masks of the values above a cut, block after block in order; it counts off the equal ones."""

    def __init__(self, cut: Cut) -> None:
        self._cut, self._equal = cut, cut.equal

    def mask(self, values: torch.Tensor) -> torch.Tensor:
        """Which values of the next block are taken, bool of its shape."""
        taken = values > self._cut.value
        if self._equal:
            # Most blocks hold few values that equal the cut, so their positions are cheap.
            places = (values == self._cut.value).reshape(-1).nonzero().reshape(-1)[: self._equal]
            self._equal -= len(places)
            flat = taken.reshape(-1)
            flat[places] = True
            taken = flat.reshape(values.shape)
        return taken


def _bucket(block: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits of the float32 patterns, int32 of one dimension."""
    return block.reshape(-1).float().view(torch.int32) >> 16
