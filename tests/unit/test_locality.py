"""SRP and SCH against known answers, plain loops and the optimal cache."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesurg.surgery.analysis.locality import (
    Prediction,
    best_prediction,
    cache_hits,
    interval,
    window_counts,
)


def one_expert(pattern: list[int], window: int) -> Prediction:
    """SRP of expert 0, of a trace in which expert 1 is selected wherever expert 0 is not."""
    trace_T1 = np.array([[0 if on else 1] for on in pattern])
    return best_prediction(window_counts(trace_T1, 2, window)[:1])


def test_an_expert_that_is_always_selected_is_kept_always() -> None:
    for window in (1, 4, 16):
        found = one_expert([1] * 32, window)
        assert (found.srp, found.ratio) == (1.0, 1.0)


def test_a_run_of_sixteen_and_a_pause_of_sixteen() -> None:
    found = one_expert([1] * 16 + [0] * 16, 4)
    assert found.srp == pytest.approx(0.96610, abs=5e-6)
    assert found.ratio == pytest.approx(1.03448, abs=5e-6)
    assert found.threshold == 2


def test_an_expert_that_alternates_is_half_of_what_is_kept() -> None:
    found = one_expert([1, 0] * 16, 4)
    assert found.srp == pytest.approx(2 / 3)
    assert found.ratio == pytest.approx(2.0)


def test_windows_of_one_token_are_known_and_an_idle_expert_is_worth_nothing() -> None:
    assert one_expert([1, 0, 0, 1, 1, 0], 1).srp == 1.0
    idle = one_expert([0] * 12, 4)
    assert (idle.srp, idle.ratio) == (0.0, 0.0)


def test_no_window_crosses_sequences_and_short_ones_have_none() -> None:
    trace_TK = np.array([[0, 1], [1, 2], [0, 2]])
    assert window_counts(trace_TK, 3, 4).sum() == 0
    counts = window_counts(trace_TK, 3, 2)
    assert counts.tolist() == [[0, 2, 0], [0, 1, 1], [0, 1, 1]]
    assert counts.sum(axis=1).tolist() == [2, 2, 2]


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_it_is_the_plain_loop(seed: int, window: int) -> None:
    rng = np.random.default_rng(seed)
    trace_TK = np.array([rng.choice(5, 2, replace=False) for _ in range(20)])
    windows = [trace_TK[start : start + window] for start in range(21 - window)]
    counted = [[int((part == expert).sum()) for part in windows] for expert in range(5)]
    best = 0.0
    for threshold in range(window + 1):
        kept = [f for row in counted for f in row if f >= threshold]
        all_f = sum(map(sum, counted))
        best = max(best, 2 * sum(kept) / (window * len(kept) + all_f))
    assert best_prediction(window_counts(trace_TK, 5, window)).srp == pytest.approx(best)


def test_the_interval_holds_the_value_and_is_a_point_for_equal_sequences() -> None:
    rng = np.random.default_rng(0)
    traces = [np.array([rng.choice(6, 2, replace=False) for _ in range(40)]) for _ in range(30)]
    histograms = np.stack([window_counts(trace, 6, 4) for trace in traces])
    low, high = interval(histograms, np.random.default_rng(1), draws=200)
    assert low < best_prediction(histograms.sum(axis=0)).srp < high
    same = np.stack([histograms[0]] * 5)
    low, high = interval(same, np.random.default_rng(1), draws=20)
    assert low == high


def belady(trace_TK: np.ndarray, capacity: int) -> float:
    """Hits of the cache that evicts what is needed last, first selections with free places counted as hits."""
    asked = [int(expert) for row in trace_TK for expert in row]
    resident: set[int] = set()
    hits = 0
    for place, expert in enumerate(asked):
        if expert in resident:
            hits += 1
        elif len(resident) < capacity:
            hits += 1
            resident.add(expert)
        else:
            after = asked[place + 1 :]
            resident.remove(
                max(resident, key=lambda e: after.index(e) if e in after else len(after))
            )
            resident.add(expert)
    return hits / len(asked)


def least_recently_used(trace_TK: np.ndarray, capacity: int) -> float:
    asked = [int(expert) for row in trace_TK for expert in row]
    resident: list[int] = []
    hits = 0
    for expert in asked:
        if expert in resident:
            resident.remove(expert)
            hits += 1
        elif len(resident) < capacity:
            hits += 1
        else:
            resident.pop(0)
        resident.append(expert)
    return hits / len(asked)


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_the_cache_is_between_nothing_and_the_optimum_and_grows_with_its_places(
    seed: int, window: int
) -> None:
    rng = np.random.default_rng(seed)
    trace_TK = np.array([rng.choice(6, 2, replace=False) for _ in range(40)])
    found = [cache_hits([trace_TK], 6, capacity, window) for capacity in range(1, 7)]
    assert found[-1] == 1.0
    assert all(small <= large for small, large in pairwise(found))
    for capacity, hits in enumerate(found, start=1):
        assert hits <= belady(trace_TK, capacity) + 1e-12


@given(st.integers(0, 10_000))
def test_a_cache_that_sees_the_end_is_the_plain_rule(seed: int) -> None:
    """Among experts that never come again the oldest goes: with all counts equal, the least recently used."""
    rng = np.random.default_rng(seed)
    trace_T1 = np.array([[expert] for block in range(4) for expert in rng.permutation(5)])
    # Without sight beyond the current token, every resident expert's count is zero.
    assert cache_hits([trace_T1], 5, 3, 1) == least_recently_used(trace_T1, 3)


def test_constant_routing_always_hits_and_every_sequence_begins_anew() -> None:
    constant_TK = np.array([[3, 1]] * 10)
    assert cache_hits([constant_TK], 8, 2, 4) == 1.0
    assert cache_hits([constant_TK, np.array([[5, 6]] * 3)], 8, 2, 4) == 1.0
    assert cache_hits([], 8, 2, 4) == 0.0


def test_the_cache_keeps_what_it_sees_coming() -> None:
    """0 comes back within the window, 1 does not: 2 takes the place of 1 although 0 is older."""
    trace_T1 = np.array([[0], [1], [2], [0]])
    assert cache_hits([trace_T1], 3, 2, 3) == 3 / 4
    assert least_recently_used(trace_T1, 2) == 2 / 4
