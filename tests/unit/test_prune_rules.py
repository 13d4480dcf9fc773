"""Counting rules and scores of pruning, on numbers small enough to check by hand."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesurg.surgery.architectures.base import RouterRule
from moesurg.surgery.architectures.routing import route
from moesurg.surgery.calibration.layer_statistics import (
    ALL_EXPERT,
    OPTIONAL,
    ROUTED,
    LayerStatistics,
    shape_of,
)
from moesurg.surgery.errors import InputError
from moesurg.surgery.methods.prune import aimer, ean, frequency, gate, hope, man, msan, naee, reap
from moesurg.surgery.methods.prune._keep import (
    Groups,
    candidates,
    check_counts,
    count_subsets,
    keep_list,
    subsets,
    super_experts,
)
from moesurg.surgery.methods.prune._saliency import SUMS, saliency


def layer(experts: int = 2, **fields: Any) -> LayerStatistics:
    """Statistics of a layer, 0 where nothing is given."""
    values: dict[str, Any] = {
        name: np.zeros(shape_of(name, experts, 3)) for name in ROUTED if name != "tokens"
    }
    values |= {name: np.asarray(value, np.float64) for name, value in fields.items()}
    values |= dict.fromkeys((*ALL_EXPERT, *OPTIONAL))
    return LayerStatistics(0, 101.0, **values)


def one_token_against_a_hundred() -> LayerStatistics:
    """Expert 0: 1 token, g = .9, ||f|| = 10; expert 1: 100 tokens, g = .5, ||f|| = 2."""
    count, g, n = np.array([1.0, 100.0]), np.array([0.9, 0.5]), np.array([10.0, 2.0])
    sums = {field: count * g**a * n**b for (a, b), field in SUMS.items()}
    return layer(**sums)


def test_scores_rank_as_their_formulas_say() -> None:
    stats = one_token_against_a_hundred()
    np.testing.assert_allclose(reap.score(stats), [9.0, 1.0])
    np.testing.assert_allclose(man.score(stats), [10.0, 2.0])
    np.testing.assert_allclose(msan.score(stats), [100.0, 4.0])
    np.testing.assert_allclose(frequency.score(stats), [1.0, 100.0])
    np.testing.assert_allclose(gate.score(stats), [0.9, 50.0])
    np.testing.assert_allclose(ean.score(stats), [10.0, 200.0])
    weighted = saliency(stats, mean=False, gate=1, norm=1)
    np.testing.assert_allclose(weighted, [9.0, 100.0])
    squared = saliency(stats, mean=False, gate=2, norm=2)
    np.testing.assert_allclose(squared, [81.0, 100.0])
    kept = {
        name: keep_list(list(score), 1)
        for name, score in (
            ("reap", reap.score(stats)),
            ("man", man.score(stats)),
            ("frequency", frequency.score(stats)),
            ("ean", ean.score(stats)),
            ("weighted", weighted),
        )
    }
    assert kept == {"reap": [0], "man": [0], "frequency": [1], "ean": [1], "weighted": [1]}


def test_means_are_sums_over_counts() -> None:
    stats = one_token_against_a_hundred()
    np.testing.assert_array_equal(saliency(stats, mean=False, gate=0, norm=0), stats.count_E)
    product = reap.score(stats) * stats.count_E
    np.testing.assert_allclose(product, saliency(stats, mean=False, gate=1, norm=1))


# Who stays


def test_of_equal_scores_the_first_goes() -> None:
    assert keep_list([1.0, 1.0, 1.0, 1.0], 2) == [2, 3]
    assert keep_list([2.0, 1.0, 3.0], 3) == [0, 1, 2]
    assert keep_list([float("-inf"), -5.0, 0.0], 2) == [1, 2]


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(InputError, match="layer 4, expert 1: its score is not a number"):
        keep_list([1.0, float("nan")], 1, where="layer 4")


@given(
    scores=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    each=st.integers(1, 4),
    forced=st.sets(st.integers(0, 11), max_size=1),
)
def test_groups_keep_the_same_number_each(scores: list[int], each: int, forced: set[int]) -> None:
    kept = keep_list([float(s) for s in scores], 3 * each, groups=3, forced=forced)
    assert kept == sorted(set(kept))
    assert forced <= set(kept)
    for first in (0, 4, 8):
        inside = [expert for expert in kept if first <= expert < first + 4]
        assert len(inside) == each
        dropped = set(range(first, first + 4)) - set(inside)
        free = set(inside) - forced
        assert all(scores[out] <= scores[stay] for out in dropped for stay in free)


def test_a_quarter_of_grouped_experts_is_one_of_each_group() -> None:
    scores = [float((7 * expert) % 16) for expert in range(16)]
    kept = keep_list(scores, 12, groups=4)
    assert [sum(4 * g <= expert < 4 * g + 4 for expert in kept) for g in range(4)] == [3] * 4
    worst = {min(range(4 * g, 4 * g + 4), key=scores.__getitem__) for g in range(4)}
    assert set(range(16)) - set(kept) == worst


@pytest.mark.parametrize(
    ("keep", "top_k", "groups", "sentence"),
    [
        (0, 1, Groups(), "the model has 16 per layer"),
        (17, 1, Groups(), "the model has 16 per layer"),
        (3, 4, Groups(), "fewer than the 4"),
        (10, 4, Groups(4, 2), "evenly in the 4 groups"),
        (4, 2, Groups(4, 2), "leaves 1 in each of 4 groups"),
        (8, 6, Groups(4, 2), "leaves 2 in each of 4 groups"),
    ],
)
def test_counts_no_router_works_with_are_refused(
    keep: int, top_k: int, groups: Groups, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        check_counts(16, keep, top_k, groups)
    hint = caught.value.hint or ""
    if "or more" in hint:  # the hint's own number works
        check_counts(16, int(hint.split()[2]), top_k, groups)


def test_counts_that_work_pass() -> None:
    check_counts(16, 8, 4, Groups(4, 2))
    check_counts(16, 4, 4)


def test_more_protected_than_kept_is_an_error() -> None:
    with pytest.raises(InputError, match=r"layer 2: 3 experts must stay \(0, 1, 3\)"):
        keep_list([0.0] * 4, 2, forced={0, 1, 3}, where="layer 2")


@pytest.mark.parametrize(("groups", "forced"), [(1, ()), (2, ()), (2, (0, 5))])
def test_subsets_are_all_there_is_in_order(groups: int, forced: tuple[int, ...]) -> None:
    choices = candidates(8, 4, groups=groups, forced=forced)
    found = list(subsets(choices))
    each = 4 // groups
    expected = [
        chosen
        for chosen in itertools.combinations(range(8), 4)
        if not set(chosen) & set(forced)
        and all(
            sum(first <= e < first + 8 // groups for e in chosen) == each
            for first in range(0, 8, 8 // groups)
        )
    ]
    assert found == expected
    assert count_subsets(choices) == len(found)


def test_super_experts_are_extreme_early_and_absolute() -> None:
    """Thresholds by absolute value; the last quarter of the layers has none."""
    values = {index: np.full(100, 1.0) for index in range(4)}
    values[0][7], values[3][5], values[1][3] = 50.0, 60.0, 4.0
    statistics = SimpleNamespace(
        layers=[0, 1, 2, 3], layer=lambda index: layer(100, max_abs_E=values[index])
    )
    model = SimpleNamespace(layers=range(4))
    found = super_experts(cast(Any, model), cast(Any, statistics))
    assert found == {0: [7], 1: [], 2: [], 3: []}


# AIMER


def score_of(entries: Any) -> float:
    w = np.asarray(entries, np.float64)
    return aimer.ratio(float(np.abs(w).sum()), float((w**2).sum()), w.size)


def test_aimer_of_known_weights() -> None:
    assert score_of(np.full(1000, -3.0)) == pytest.approx(1.0)
    one_hot = np.zeros(400)
    one_hot[17] = 5.0
    assert score_of(one_hot) == pytest.approx(1 / 20)
    normal = np.random.default_rng(0).standard_normal(1_000_000)
    assert score_of(normal) == pytest.approx(np.sqrt(2 / np.pi), abs=1e-3)
    assert score_of(np.zeros(5)) == 1.0


# HOPE

WORKED = np.array([[1.0, 10.0, 0.0], [10.0, 1.0, 0.0], [0.0, 0.0, 2.0]])


@pytest.mark.parametrize("limit", [hope.EXHAUSTIVE, 0])
def test_hope_sees_pairs_where_the_diagonal_does_not(limit: int) -> None:
    choices = candidates(3, 1)
    found = hope.solve(WORKED, choices, limit=limit)
    assert found.objective == 3.0
    assert found.exact == (limit > 0)
    assert found.dropped == (0, 2) if limit else found.dropped in [(0, 2), (1, 2)]
    assert hope.diagonal_choice(WORKED, choices) == (0, 1)
    assert hope.objective(WORKED, (0, 1)) == 22.0


def interactions(experts: int, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    root = generator.random((experts, experts)) * (generator.random((experts, experts)) < 0.5)
    return root + root.T + np.diag(generator.random(experts))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("groups", [1, 2])
def test_hope_searches_exhaustively_and_locally(seed: int, groups: int) -> None:
    matrix = interactions(10, seed)
    choices = candidates(10, 6, groups=groups, forced={1})
    best = min(hope.objective(matrix, dropped) for dropped in subsets(choices))
    exact, local = hope.solve(matrix, choices), hope.solve(matrix, choices, limit=0)
    assert exact.exact
    assert exact.objective == pytest.approx(best, rel=1e-12)
    assert not local.exact
    assert local.dropped in set(subsets(choices))
    diagonal = hope.objective(matrix, hope.diagonal_choice(matrix, choices))
    assert best <= local.objective + 1e-12 <= diagonal + 2e-12
    # No exchange helps any more.
    for out, into in itertools.product(local.dropped, range(10)):
        other = tuple(sorted({*local.dropped, into} - {out}))
        if other in set(subsets(choices)):
            assert hope.objective(matrix, other) >= local.objective - 1e-9


@pytest.mark.parametrize("limit", [hope.EXHAUSTIVE, 0])
def test_hope_without_pairs_sorts_by_the_diagonal(limit: int) -> None:
    matrix = np.diag([5.0, 1.0, 4.0, 2.0, 3.0])
    assert hope.solve(matrix, candidates(5, 2), limit=limit).dropped == (1, 3, 4)


def test_hope_relaxes_large_layers() -> None:
    matrix = interactions(128, 0)
    choices = candidates(128, 64)
    found = hope.solve(matrix, choices)
    assert not found.exact
    diagonal = hope.objective(matrix, hope.diagonal_choice(matrix, choices))
    assert found.objective < 0.9 * diagonal


def test_interactions_are_means_over_shared_tokens() -> None:
    stats = layer(
        2,
        pair_count_EE=[[4.0, 2.0], [2.0, 5.0]],
        pair_activation_EE=[[8.0, 3.0], [3.0, 20.0]],
    )
    np.testing.assert_array_equal(hope.interaction(stats), [[2.0, 1.5], [1.5, 4.0]])
    np.testing.assert_array_equal(hope.interaction(layer(2)), np.zeros((2, 2)))


def test_averaged_over_all_tokens_the_objective_is_a_mean_square() -> None:
    activation_TE = interactions(6, 3)[:, :6]
    stats = layer(6, pair_activation_EE=activation_TE.T @ activation_TE)
    matrix = hope.interaction(stats, shared=False)
    for dropped in ((0,), (1, 4), (0, 2, 3, 5)):
        square = (activation_TE[:, dropped].sum(axis=1) ** 2).sum() / stats.tokens
        assert hope.objective(matrix, dropped) == pytest.approx(square)


# NAEE


def test_dropping_half_of_the_probability_doubles_unrenormalised_weights() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]]))
    plain = RouterRule("softmax", 3, renormalise=False)
    before = naee.dense_weights(logits, plain, range(4))
    after = naee.dense_weights(logits, plain, [1, 2, 3])
    torch.testing.assert_close(before[0], torch.tensor([0.5, 0.2, 0.2, 0.0]).double())
    torch.testing.assert_close(after[0], torch.tensor([0.0, 0.4, 0.4, 0.2]).double())


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_router_without_experts_is_one_with_masked_logits(renormalise: bool) -> None:
    rule = RouterRule("softmax", 2, renormalise=renormalise)
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    masked = logits.clone()
    masked[:, [0, 3]] = float("-inf")
    weights, index = route(masked, rule)
    expected = torch.zeros(50, 6, dtype=torch.float64).scatter_(1, index, weights.double())
    torch.testing.assert_close(naee.dense_weights(logits, rule, [1, 2, 4, 5]), expected)


def test_a_row_of_large_negative_numbers_is_no_mask() -> None:
    """The sign of its logit is that of the input's sum: it wins about half of the tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2000, 16, generator=generator)
    router = torch.randn(4, 16, generator=generator)
    router[2] = -1e9
    _, index = route(rows @ router.T, RouterRule("softmax", 1, renormalise=True))
    assert 0.4 < float((index == 2).double().mean()) < 0.6


def test_naee_adds_norms_of_batches_and_keeps_lengths() -> None:
    generator = torch.Generator().manual_seed(2)
    output_TED = torch.randn(64, 4, 7, generator=generator)
    logits = torch.randn(64, 4, generator=generator)
    rule = RouterRule("softmax", 2, renormalise=True)
    basis = naee.coordinates(output_TED)
    assert basis.shape == (64, 4, 4)
    total, losses = naee.search(logits, basis, rule, candidates(4, 2))
    wide = output_TED.double()
    before = naee.dense_weights(logits, rule, range(4))
    batched = (before[:, :, None] * wide).sum(1).reshape(16, 4, 7).flatten(1)
    assert total == pytest.approx(float(batched.norm(dim=1).sum()))
    assert total > 1.5 * float(batched.norm())  # not the norm of all
    for dropped, loss in losses.items():
        kept = [expert for expert in range(4) if expert not in dropped]
        after = naee.dense_weights(logits, rule, kept)
        difference = ((before - after)[:, :, None] * wide).sum(1).reshape(16, 4, 7).flatten(1)
        assert loss == pytest.approx(float(difference.norm(dim=1).sum()))
    assert list(losses) == list(itertools.combinations(range(4), 2))
