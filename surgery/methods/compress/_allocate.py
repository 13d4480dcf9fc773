"""Ranks from spectra: how much of every matrix goes, so that all together are cut by the asked ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._ranks import Shape, rounded, stored

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

RULES = ("uniform", "energy", "welore", "waterfill")
RULE_HELP = (
    "who loses how much; uniform: every matrix the same fraction; energy: all keep the same share of their squared "
    "singular values; welore: one threshold on all scaled spectra; waterfill: the ranks whose summed relative errors "
    "are least. All but uniform read the weights twice"
)
HALVINGS = 80
"""Steps in which the price of a number is found; doubles have no more digits."""


@dataclass(frozen=True)
class Item:
    """Matrices that get one rank: one, or the same projection of all experts of a layer.

    Attributes:
        shape: of each.
        count: how many there are.
        values_P: singular values, largest first; of several matrices the root mean square of theirs, by place.
    """

    shape: Shape
    count: int
    values_P: Values


def allocate(
    items: Mapping[str, Item],
    rule: str,
    *,
    form: str,
    ratio: float,
    align: int,
    index: float = 1.0,
) -> dict[str, int]:
    """Ranks by item that remove at least ``ratio`` of all numbers; an absent item stays whole.

    Args:
        index: what the index of a pivot counts.

    Returns:
        No ranks at all where nothing meets the ratio.
    """
    from ...linalg.spectrum import places

    if rule == "waterfill":
        return _waterfill(items, form, ratio, align, index)
    scale = {"welore": "minmax", "energy": "energy"}[rule]
    scaled = {label: places(item.values_P, scale) for label, item in items.items()}
    return thresholded(items, scaled, form=form, ratio=ratio, align=align, index=index)[1]


def thresholded(
    items: Mapping[str, Item],
    places: Mapping[str, Values],
    *,
    form: str,
    ratio: float,
    align: int,
    least_cut: float = 0.0,
    index: float = 1.0,
) -> tuple[float, dict[str, int]]:
    """The smallest threshold that removes a fraction of all numbers, and the ranks of what is replaced.

    Args:
        places: of each item's values, largest first; see :mod:`linalg.spectrum`.
        least_cut: fraction of its values that an item must lose to be replaced.

    Returns:
        No ranks at all where no threshold is high enough.
    """
    import numpy as np

    from ...linalg.spectrum import cut

    def ranks_at(threshold: float) -> tuple[float, dict[str, int]]:
        total, ranks = 0.0, {}
        for label, item in items.items():
            size, full = item.shape[0] * item.shape[1], min(item.shape)
            gone = cut(places[label], threshold)
            rank = rounded(full - gone, full, align)
            needed = stored(form, item.shape, rank, index)
            if gone > least_cut * full and needed < size:
                ranks[label] = rank
                total += item.count * needed
            else:
                total += item.count * size
        return total, ranks

    budget = (1 - ratio) * sum(
        item.count * item.shape[0] * item.shape[1] for item in items.values()
    )
    pooled = np.unique(np.concatenate([*places.values(), [2.0]]))
    low, high = 0, len(pooled) - 1
    if ranks_at(pooled[high])[0] > budget:
        return float(pooled[high]), {}
    while low < high:
        middle = (low + high) // 2
        if ranks_at(pooled[middle])[0] <= budget:
            high = middle
        else:
            low = middle + 1
    return float(pooled[high]), ranks_at(pooled[high])[1]


def _waterfill(
    items: Mapping[str, Item], form: str, ratio: float, align: int, index: float
) -> dict[str, int]:
    """Ranks of the least sum of relative squared errors.

    For a price of a number every item takes the rank at which error plus price times numbers is least; the price is
    the lowest that meets the ratio. Sums of such choices are optimal among all that store as many numbers (the pivot
    form's numbers are concave in the rank, so that some totals have no price; what is left over is spent on the
    steps that gain most a number).
    """
    import numpy as np

    choices: dict[str, tuple[list[int], Values, Values]] = {}
    for label, item in items.items():
        size, full = item.shape[0] * item.shape[1], min(item.shape)
        ranks = sorted({rounded(rank, full, align) for rank in range(1, full)})
        ranks = [rank for rank in ranks if stored(form, item.shape, rank, index) < size]
        squares_P = np.square(item.values_P)
        total = float(squares_P.sum())
        tail = np.append(squares_P[::-1].cumsum()[::-1], 0.0) / (total or 1.0)
        numbers = [stored(form, item.shape, rank, index) for rank in ranks] + [size]
        errors = [tail[rank] for rank in ranks] + [0.0]
        choices[label] = (
            [*ranks, full],
            item.count * np.array(errors),
            item.count * np.array(numbers, dtype=np.float64),
        )
    before = sum(item.count * item.shape[0] * item.shape[1] for item in items.values())
    budget = (1 - ratio) * before

    def taken(price: float) -> dict[str, int]:
        return {
            label: int(np.argmin(errors + price * numbers))
            for label, (_, errors, numbers) in choices.items()
        }

    def cost(chosen: Mapping[str, int]) -> float:
        return float(sum(choices[label][2][place] for label, place in chosen.items()))

    low, high = 0.0, 1.0
    while cost(taken(high)) > budget and high < 1e300:
        high *= 16
    if cost(taken(high)) > budget:
        return {}
    for _ in range(HALVINGS):
        # Prices are far below 1: halve their logarithm once a lower bound is known.
        middle = (low * high) ** 0.5 if low else high / 16
        if cost(taken(middle)) <= budget:
            high = middle
        elif middle > 0:
            low = middle
        if low and high <= low * (1 + 1e-12):
            break
    chosen = _spent(choices, taken(high), budget - cost(taken(high)))
    return {
        label: choices[label][0][place]
        for label, place in chosen.items()
        if place < len(choices[label][0]) - 1
    }


def _spent(
    choices: Mapping[str, tuple[list[int], Values, Values]], chosen: dict[str, int], left: float
) -> dict[str, int]:
    """Raise ranks by single steps, what gains most a number first, while numbers are left."""

    def gain(label: str) -> float:
        _, errors, numbers = choices[label]
        at = chosen[label]
        return float((errors[at] - errors[at + 1]) / (numbers[at + 1] - numbers[at]))

    def step(label: str) -> float:
        ranks, _, numbers = choices[label]
        at = chosen[label]
        return float(numbers[at + 1] - numbers[at]) if at + 1 < len(ranks) else float("inf")

    while True:
        able = [label for label in chosen if step(label) <= left]
        if not able:
            return chosen
        best = max(able, key=lambda label: (gain(label), label))
        left -= step(best)
        chosen[best] += 1
