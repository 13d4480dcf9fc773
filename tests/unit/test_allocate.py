"""Ranks from spectra against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesurg.surgery.methods.compress._allocate import Item, allocate
from moesurg.surgery.methods.compress._ranks import stored, uniform_ranks


def items(seed: int, shapes: list[tuple[int, int]]) -> dict[str, Item]:
    generator = np.random.default_rng(seed)
    return {
        f"m{place}": Item(
            shape,
            1 + place % 2,
            np.sort(generator.exponential(size=min(shape)) ** (1 + place))[::-1],
        )
        for place, shape in enumerate(shapes)
    }


def numbers(made: dict[str, Item], ranks: dict[str, int], form: str, index: float = 1.0) -> float:
    return sum(
        item.count
        * (
            stored(form, item.shape, ranks[label], index)
            if label in ranks
            else item.shape[0] * item.shape[1]
        )
        for label, item in made.items()
    )


def errors(made: dict[str, Item], ranks: dict[str, int]) -> float:
    """Sum of relative squared errors."""
    total = 0.0
    for label, item in made.items():
        squares = np.square(item.values_P)
        total += item.count * float(squares[ranks.get(label, len(squares)) :].sum() / squares.sum())
    return total


@pytest.mark.parametrize("rule", ["energy", "welore", "waterfill"])
@pytest.mark.parametrize("form", ["pivot", "factors"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("index", [1.0, 2.0])
def test_ranks_meet_the_ratio_and_save(rule: str, form: str, ratio: float, index: float) -> None:
    made = items(0, [(96, 64), (64, 64), (64, 200), (24, 64), (128, 128)])
    ranks = allocate(made, rule, form=form, ratio=ratio, align=1, index=index)
    whole = numbers(made, {}, form)
    assert numbers(made, ranks, form, index) <= (1 - ratio) * whole
    for label, rank in ranks.items():
        rows, columns = made[label].shape
        assert 1 <= rank < min(rows, columns)
        assert stored(form, (rows, columns), rank, index) < rows * columns


@pytest.mark.parametrize("form", ["pivot", "factors"])
def test_waterfilling_is_as_good_as_any_choice(form: str) -> None:
    made = items(3, [(10, 8), (8, 9), (12, 8)])
    whole = numbers(made, {}, form)
    for ratio in (0.2, 0.4):
        ranks = allocate(made, "waterfill", form=form, ratio=ratio, align=1)
        best = min(
            errors(made, dict(zip(made, choice, strict=True)))
            for choice in itertools.product(range(1, 9), repeat=3)
            if numbers(made, {n: r for n, r in zip(made, choice, strict=True) if r < 8}, form)
            <= (1 - ratio) * whole
        )
        # Numbers are no convex function of ranks, so a price may miss the best by one step.
        assert best <= errors(made, ranks) <= 1.2 * best
        uniform = uniform_ranks({(10, 8): 1, (8, 9): 2, (12, 8): 1}, form, ratio, 1).ranks
        assert errors(made, ranks) <= errors(made, {n: uniform[i.shape] for n, i in made.items()})


def test_equal_matrices_get_equal_ranks_and_steep_ones_lose_more() -> None:
    values = np.linspace(1, 0.1, 64)
    flat = {name: Item((64, 64), 1, values) for name in "ab"}
    for rule in ("energy", "welore"):
        ranks = allocate(flat, rule, form="pivot", ratio=0.3, align=1)
        assert ranks["a"] == ranks["b"]
    mixed = {"flat": Item((64, 64), 1, values), "steep": Item((64, 64), 1, values**6)}
    for rule in ("energy", "welore", "waterfill"):
        ranks = allocate(mixed, rule, form="pivot", ratio=0.3, align=1)
        assert ranks["steep"] < ranks.get("flat", 64)


def test_large_matrices_get_multiples() -> None:
    made = items(1, [(1200, 1024), (1024, 1024)])
    for rule in ("energy", "welore", "waterfill"):
        ranks = allocate(made, rule, form="pivot", ratio=0.3, align=16)
        assert ranks
        assert not [rank for rank in ranks.values() if rank % 16]
