"""Numbers by layer: known answers, bounds, symmetries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurg.surgery.errors import UsageError
from moesurg.surgery.schedules import SHAPES, mola, parse, shaped

EIGHT = {
    "uniform": [8] * 8,
    "descending": [8, 7, 6, 5, 5, 4, 3, 2],
    "ascending": [2, 3, 4, 5, 5, 6, 7, 8],
    "pyramid-up": [2, 4, 5, 7, 7, 5, 4, 2],
    "pyramid-down": [8, 6, 5, 3, 3, 5, 6, 8],
    "wave": [5, 7, 8, 6, 4, 2, 3, 5],
}
FIVE = {
    "descending": [10, 8, 6, 4, 2],
    "pyramid-up": [2, 6, 10, 6, 2],
    "wave": [6, 10, 6, 2, 6],
}


@pytest.mark.parametrize("name", SHAPES)
def test_known_answers(name: str) -> None:
    assert shaped(name, 8, 2, 8) == EIGHT[name]
    if name in FIVE:
        assert shaped(name, 5, 2, 10) == FIVE[name]


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 80), st.integers(0, 50), st.integers(0, 50))
def test_within_bounds(name: str, layers: int, low: int, more: int) -> None:
    numbers = shaped(name, layers, low, low + more)
    assert len(numbers) == layers
    assert all(low <= number <= low + more for number in numbers)


@given(st.integers(2, 80), st.integers(0, 50), st.integers(0, 50))
def test_shapes_agree_with_each_other(layers: int, low: int, more: int) -> None:
    high = low + more
    down, up = (shaped(name, layers, low, high) for name in ("descending", "ascending"))
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert (down[0], down[-1], up[0], up[-1]) == (high, low, low, high)
    assert all(low + high <= a + b <= low + high + 1 for a, b in zip(down, up, strict=True))
    for name in ("pyramid-up", "pyramid-down"):
        hill = shaped(name, layers, low, high)
        assert hill == hill[::-1]


def test_mola_quarters() -> None:
    assert mola([2, 4, 6, 8], 32) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert parse("mola:8228", 8, "--x") == [8, 8, 2, 2, 2, 2, 8, 8]
    assert parse("mola:16,4", 5, "--x") == [16, 16, 16, 4, 4]
    assert [mola([1, 2, 3, 4], 6).count(n) for n in (1, 2, 3, 4)] == [2, 1, 2, 1]


def test_what_a_user_may_write() -> None:
    assert parse("16", 3, "--x") == [16, 16, 16]
    assert parse("1,2,3", 3, "--x") == [1, 2, 3]
    assert parse("descending:2-8", 8, "--x") == EIGHT["descending"]
    assert parse("uniform:4", 2, "--x") == [4, 4]


@pytest.mark.parametrize(
    "text", ["", "up:1-2", "wave:3", "wave:5-2", "1,2", "mola:", "mola:12345", "descending:a-b"]
)
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text, 3, "--x")
