"""How many experts each layer keeps: the numbers with the smallest summed cost under a total, exactly."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import InputError


def allocate(curves: Mapping[int, Mapping[int, float]], total: int) -> dict[int, int]:
    """Numbers by layer with the smallest summed cost, by dynamic programming over layers and totals.

    Args:
        curves: for each layer the cost of every number it may have.
        total: what the numbers add up to.

    Returns:
        Number by layer; among equal costs the one that gives earlier layers fewer.

    Raises:
        InputError: no choice adds up to the total.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for curve in curves.values():
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, chosen) in best.items():
            for count, more in curve.items():
                if used + count <= total:
                    candidate = (cost + more, (*chosen, count))
                    if candidate < following.get(used + count, (float("inf"), ())):
                        following[used + count] = candidate
        best = following
    if total not in best:
        raise InputError(
            f"no allocation of numbers of experts to {len(curves)} layers adds up to {total}"
        )
    return dict(zip(curves, best[total][1], strict=True))
