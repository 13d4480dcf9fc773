"""How many numbers each form stores, and the ranks that meet a ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, int]

FORMS = ("pivot", "factors", "dense")


def stored(form: str, shape: Shape, rank: int) -> int:
    """Numbers that a matrix of a rank takes; the dense form counts what its pivot form would take."""
    rows, columns = shape
    if form == "factors":
        return rank * (rows + columns)
    return rank * (rows + columns - rank) + rank  # with the index of the pivots


@dataclass(frozen=True)
class Ranks:
    """Ranks by shape; a shape that is absent stays as it is, because no rank would save.

    Attributes:
        ranks: by shape.
        before, after: numbers of all matrices in question, without and with these ranks.
    """

    ranks: Mapping[Shape, int]
    before: int
    after: int


def uniform_ranks(counts: Mapping[Shape, int], form: str, ratio: float, align: int) -> Ranks:
    """One rank per shape that removes at least ``ratio`` of the numbers of all matrices.

    Every shape is cut by the same ratio. Where a matrix is large enough (16 multiples on its small side), its
    rank is a multiple of ``align``, rounded down; then ranks go up again one step at a time, the shape that
    rounding cost the largest share first, while the total stays within the ratio.

    Args:
        counts: how many matrices there are of each shape.
    """
    exact: dict[Shape, int] = {}
    steps: dict[Shape, int] = {}
    ranks: dict[Shape, int] = {}
    for shape, count in counts.items():
        size = shape[0] * shape[1]
        rank = _largest(form, shape, (1 - ratio) * size)
        if not count or not rank:
            continue
        step = align if min(shape) >= 16 * align else 1
        exact[shape], steps[shape] = rank, step
        ranks[shape] = max(rank - rank % step, min(rank, step))
    before = sum(count * shape[0] * shape[1] for shape, count in counts.items())
    budget = (1 - ratio) * before
    for shape in sorted(ranks, key=lambda key: (ranks[key] / exact[key], key)):
        raised = ranks[shape] + steps[shape]
        saves = raised < min(shape) and stored(form, shape, raised) < shape[0] * shape[1]
        if (
            saves
            and ranks[shape] < exact[shape]
            and _total(counts, {**ranks, shape: raised}, form) <= budget
        ):
            ranks[shape] = raised
    return Ranks(ranks, before, _total(counts, ranks, form))


def _largest(form: str, shape: Shape, budget: float) -> int:
    """The largest rank whose form takes at most ``budget`` numbers and fewer than the matrix; 0 if none."""
    low, high = 0, min(shape)
    while low < high:
        middle = (low + high + 1) // 2
        needed = stored(form, shape, middle)
        if needed <= budget and needed < shape[0] * shape[1]:
            low = middle
        else:
            high = middle - 1
    return low


def _total(counts: Mapping[Shape, int], ranks: Mapping[Shape, int], form: str) -> int:
    return sum(
        count * (stored(form, shape, ranks[shape]) if shape in ranks else shape[0] * shape[1])
        for shape, count in counts.items()
    )
