"""How many numbers each form stores, and the ranks that meet a ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, int]

FORMS = ("pivot", "factors", "dense")

LARGE = 64
"""Multiples of ``--align`` on its small side from which a matrix's rank is rounded: that costs 1.6 % at most."""


def rounded(rank: int, full: int, align: int) -> int:
    """A rank of at least 1, rounded down to a multiple of ``align`` where the small side ``full`` is large enough."""
    rank = max(1, rank)
    return max(align, rank - rank % align) if full >= LARGE * align else rank


def stored(form: str, shape: Shape, rank: int, index: float = 1.0) -> float:
    """Numbers that a matrix of a rank takes; the dense form counts what its pivot form would take.

    Args:
        index: what the index of a pivot counts.
    """
    rows, columns = shape
    if form == "factors":
        return rank * (rows + columns)
    return rank * (rows + columns - rank) + index * rank


@dataclass(frozen=True)
class Ranks:
    """Ranks by shape; a shape that is absent stays as it is, because no rank would save.

    Attributes:
        ranks: by shape.
        before, after: numbers of all matrices in question, without and with these ranks.
    """

    ranks: Mapping[Shape, int]
    before: int
    after: float


def uniform_ranks(
    counts: Mapping[Shape, int], form: str, ratio: float, align: int, index: float = 1.0
) -> Ranks:
    """One rank per shape that removes at least ``ratio`` of the numbers of all matrices.

    Every shape is cut by the same ratio. Where a matrix is large enough (see ``LARGE``), its rank is a multiple of
    ``align``, rounded down; then ranks go up again one step at a time, the shape that
    rounding cost the largest share first, while the total stays within the ratio.

    Args:
        counts: how many matrices there are of each shape.
        index: what the index of a pivot counts.
    """
    exact: dict[Shape, int] = {}
    steps: dict[Shape, int] = {}
    ranks: dict[Shape, int] = {}
    for shape, count in counts.items():
        size = shape[0] * shape[1]
        rank = _largest(form, shape, (1 - ratio) * size, index)
        if not count or not rank:
            continue
        step = align if min(shape) >= LARGE * align else 1
        exact[shape], steps[shape] = rank, step
        ranks[shape] = max(rank - rank % step, min(rank, step))
    before = sum(count * shape[0] * shape[1] for shape, count in counts.items())
    budget = (1 - ratio) * before
    for shape in sorted(ranks, key=lambda key: (ranks[key] / exact[key], key)):
        raised = ranks[shape] + steps[shape]
        saves = raised < min(shape) and stored(form, shape, raised, index) < shape[0] * shape[1]
        if (
            saves
            and ranks[shape] < exact[shape]
            and _total(counts, {**ranks, shape: raised}, form, index) <= budget
        ):
            ranks[shape] = raised
    return Ranks(ranks, before, _total(counts, ranks, form, index))


def _largest(form: str, shape: Shape, budget: float, index: float) -> int:
    """The largest rank whose form takes at most ``budget`` numbers and fewer than the matrix; 0 if none."""
    low, high = 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        needed = stored(form, shape, middle, index)
        if needed <= budget and needed < shape[0] * shape[1]:
            low = middle
        else:
            high = middle - 1
    return low


def _total(
    counts: Mapping[Shape, int], ranks: Mapping[Shape, int], form: str, index: float
) -> float:
    return sum(
        count
        * (stored(form, shape, ranks[shape], index) if shape in ranks else shape[0] * shape[1])
        for shape, count in counts.items()
    )
