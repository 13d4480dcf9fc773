"""How many numbers the low-rank forms store, against the published counts."""

from __future__ import annotations

import pytest

from moesurg.surgery.methods.compress._experts import Entries, Sizes, numbers
from moesurg.surgery.methods.compress._ranks import stored

QWEN = Sizes(experts=128, hidden=2048, width=768)
WHOLE = {"form": "whole"}


@pytest.mark.parametrize(
    ("shape", "last"), [((14336, 4096), 3185), ((2048, 768), 558), ((1024, 1024), 511)]
)
def test_two_factors_save_up_to_the_published_rank_and_pivots_beyond(
    shape: tuple[int, int], last: int
) -> None:
    size = shape[0] * shape[1]
    assert stored("factors", shape, last) < size <= stored("factors", shape, last + 1)
    ends = [rank for rank in range(1, min(shape)) if stored("pivot", shape, rank) < size]
    assert ends == list(range(1, ends[-1] + 1))
    assert ends[-1] > 0.95 * min(shape)
    # The indices aside, every rank that is not full saves.
    assert (
        stored("pivot", shape, min(shape) - 1, 0.0)
        < size
        == stored("pivot", shape, min(shape), 0.0)
    )


def test_the_same_room_holds_a_higher_rank_in_pivots() -> None:
    """At half of the small side, square: two factors save nothing, pivots a quarter."""
    assert stored("factors", (512, 512), 256) == 512 * 512
    assert stored("pivot", (512, 512), 256, 0.0) == 0.75 * 512 * 512


def test_shared_projections_of_the_width_of_experts() -> None:
    """MoLAE with l = p and groups of four: p / d + 1 / 4 of gate and up."""
    entry = {"form": "input", "rank": QWEN.width, "groups": QWEN.experts // 4}
    entries: Entries = {"gate": entry, "up": entry, "down": WHOLE}
    assert numbers(entries, QWEN) / QWEN.numbers == pytest.approx((2 * 0.625 + 1) / 3)


def test_mixed_bases() -> None:
    """MoBE: 1/3 + 2 r / 3 d + 2 m r / 3 E p of all, and the mixing weights."""
    inner, count = QWEN.width, 32
    entry = {"form": "bases", "inner": inner, "bases": count}
    entries: Entries = {"gate": entry, "up": entry, "down": WHOLE}
    share = 1 / 3 + 2 * inner / (3 * QWEN.hidden)
    share += 2 * count * inner / (3 * QWEN.experts * QWEN.width)
    mixing = 2 * QWEN.experts * count
    assert numbers(entries, QWEN) == pytest.approx(share * QWEN.numbers + mixing)


def test_mixed_bases_of_low_rank() -> None:
    """SLBF: E d1 r + m k (r + d2 - k) + E m for each projection, and k rows' places for each basis."""
    inner, rank, count = QWEN.width, 100, QWEN.experts
    common = {"form": "bases", "inner": inner, "bases": count, "rank": rank}
    entries: Entries = {
        "gate": {**common, "transposed": False},
        "up": {**common, "transposed": False},
        "down": {**common, "transposed": True},
    }
    each = QWEN.experts * QWEN.width * inner + count * rank * (inner + QWEN.hidden - rank)
    each += QWEN.experts * count + count * rank
    assert numbers(entries, QWEN) == 3 * each


def test_a_base_and_differences() -> None:
    """D2-MoE: each projection's base once and r (m + n) for every expert."""
    entry = {"form": "delta", "rank": 64}
    entries: Entries = {"gate": entry, "up": entry, "down": entry}
    each = QWEN.hidden * QWEN.width + QWEN.experts * 64 * (QWEN.hidden + QWEN.width)
    assert numbers(entries, QWEN) == 3 * each
