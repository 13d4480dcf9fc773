"""Thresholds on pooled spectra: the published counts, invariances and monotonicity."""

from __future__ import annotations

import numpy as np
import pytest

from moesurg.surgery.errors import UsageError
from moesurg.surgery.linalg.spectrum import cut, places, pooled_threshold
from moesurg.surgery.methods.compress._allocate import Item, thresholded
from moesurg.surgery.methods.compress._ranks import stored

KNOWN = np.array([10, 6, 4, 3, 2, 1, 0.5, 0])


@pytest.mark.parametrize(("threshold", "count"), [(0.0225, 1), (0.115, 3), (0.175, 3), (0.26, 4)])
def test_the_published_thresholds_cut_what_they_should(threshold: float, count: int) -> None:
    assert cut(places(KNOWN, "minmax"), threshold) == count


@pytest.mark.parametrize("scale", ["minmax", "quantile"])
def test_the_scale_does_not_know_size_and_offset(scale: str) -> None:
    for factor, offset in ((7.0, 0.0), (0.01, 0.0), (3.0, 5.0)):
        assert np.allclose(places(factor * KNOWN + offset, scale), places(KNOWN, scale))
    flat = np.full(5, 2.5)
    assert cut(places(flat, scale), 1.0) == 0


def test_energy_cuts_the_smallest_values_with_less_than_a_share() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        values = np.sort(generator.exponential(size=9))[::-1]
        share = generator.uniform(0.01, 0.9)
        kept = len(values) - cut(places(values, "energy"), share)
        total = float(np.square(values).sum())
        lost = float(np.square(values[kept:]).sum())
        assert lost < share * total <= float(np.square(values[kept - 1 :]).sum())


def test_one_outlier_moves_minmax_only() -> None:
    bulk = np.linspace(2, 1, 99)
    spoilt = np.concatenate([[1000.0], bulk])
    assert cut(places(spoilt, "minmax"), 0.1) == 99
    assert cut(places(spoilt, "quantile"), 0.1) < 20


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.33, 0.5, 0.9])
def test_a_pooled_threshold_cuts_its_fraction(fraction: float) -> None:
    generator = np.random.default_rng(1)
    pools = [places(np.sort(generator.exponential(size=n))[::-1], "minmax") for n in (7, 40, 53)]
    threshold = pooled_threshold(pools, fraction)
    gone = sum(cut(pool, threshold) for pool in pools)
    # The lowest place of every spectrum is 0: a tie of three, of which all are kept.
    assert gone in (0, int(np.ceil(fraction * 100)))
    counts = [sum(cut(pool, k) for pool in pools) for k in np.linspace(0, 1, 30)]
    assert counts == sorted(counts)
    with pytest.raises(UsageError):
        pooled_threshold(pools, 1.0)


@pytest.mark.parametrize("form", ["pivot", "factors"])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.8])
@pytest.mark.parametrize("least_cut", [0.0, 0.5])
def test_ranks_meet_the_ratio_and_never_store_more(
    form: str, ratio: float, least_cut: float
) -> None:
    generator = np.random.default_rng(2)
    shapes = {
        f"m{i}": shape for i, shape in enumerate([(64, 64), (96, 64), (64, 200), (8, 64)] * 3)
    }
    found = {
        name: places(np.sort(generator.exponential(size=min(shape)) ** 2)[::-1], "minmax")
        for name, shape in shapes.items()
    }
    items = {name: Item(shape, 1, found[name]) for name, shape in shapes.items()}
    threshold, ranks = thresholded(
        items, found, form=form, ratio=ratio, least_cut=least_cut, align=1
    )
    before = after = 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1]
        before += size
        after += stored(form, shape, ranks[name]) if name in ranks else size
        if name in ranks:
            assert stored(form, shape, ranks[name]) < size
            gone = cut(found[name], threshold)
            assert gone > least_cut * min(shape)
            assert ranks[name] == max(1, min(shape) - gone)
    assert after <= (1 - ratio) * before
    # The threshold is the smallest: one value fewer would not do.
    lower = float(
        np.max(
            np.concatenate(list(found.values()))[np.concatenate(list(found.values())) < threshold]
        )
    )
    kept = 0
    for name, shape in shapes.items():
        gone = cut(found[name], lower)
        rank = max(1, min(shape) - gone)
        saves = gone > least_cut * min(shape) and stored(form, shape, rank) < shape[0] * shape[1]
        kept += stored(form, shape, rank) if saves else shape[0] * shape[1]
    assert kept > (1 - ratio) * before
