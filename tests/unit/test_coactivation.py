"""Balanced groups of neurons by their marks, held against brute force; a router fitted to choices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moesurg.surgery.linalg.coactivation import coactive_groups, hot_clusters, marks
from moesurg.surgery.linalg.linear_router import chosen, fit_router, recall

BLOCKS = np.random.default_rng(3).permutation(np.repeat(np.arange(4), 6))


def planted(tokens: int = 400, noise: float = 0.05) -> torch.Tensor:
    """Four groups of six neurons each, one group active per token, and some marks at random."""
    rng = np.random.default_rng(0)
    topic = rng.integers(4, size=tokens)
    on = (topic[:, None] == BLOCKS) & (rng.random((tokens, 24)) < 0.8)
    return torch.from_numpy(on | (rng.random((tokens, 24)) < noise))


def blocks_of(members_KN: np.ndarray) -> list[set[int]]:  # type: ignore[type-arg]
    return [set(BLOCKS[members].tolist()) for members in members_KN]


def test_marks_are_the_largest_magnitudes() -> None:
    found = marks(torch.tensor([[1.0, -3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 2)
    assert found.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_hot_clusters_by_hand() -> None:
    """Two hot neurons on disjoint tokens; of the others each is nearer to one of them."""
    on = torch.tensor(
        [  # 0 and 3 are active most often
            [1, 1, 0, 0],
            [1, 0, 0, 0],
            [1, 1, 0, 0],
            [0, 0, 1, 1],
            [0, 0, 0, 1],
            [0, 0, 1, 1],
        ],
        dtype=torch.bool,
    )
    found = hot_clusters(on, 2, iterations=1)
    assert found.members_KN.tolist() == [[0, 1], [2, 3]]
    assert found.objective == (2.0,)  # neurons 1 and 2 miss one token each
    assert found.representative_K == (0, 2)  # both members are equally near, the first is taken


@pytest.mark.parametrize("how", ["hot", "coactive"])
def test_planted_groups_are_found(how: str) -> None:
    rng = np.random.default_rng(1)
    on = planted()
    if how == "hot":
        # The first centroids are the hottest neurons, which may share a group: means need a few steps to part.
        hottest = torch.argsort(on.sum(dim=0), descending=True, stable=True)[:4]
        apart = len(set(BLOCKS[hottest.numpy()].tolist())) == 4
        found = hot_clusters(on, 4, iterations=1 if apart else 30)
    else:
        found = coactive_groups(on, 4, rng, iterations=20)
    assert sorted(found.members_KN.ravel()) == list(range(24))
    if how == "coactive" or apart:
        assert all(len(blocks) == 1 for blocks in blocks_of(found.members_KN))
    assert all(
        place in members
        for place, members in zip(found.representative_K, found.members_KN, strict=True)
    )


def test_no_swap_is_left_and_small_cuts_are_the_best() -> None:
    rng = np.random.default_rng(5)
    best_found = 0
    for _ in range(10):
        on = torch.from_numpy(rng.random((30, 8)) < 0.4)
        count = (on.float().T @ on.float()).numpy()
        np.fill_diagonal(count, 0)

        def within(left: tuple[int, ...], count: np.ndarray = count) -> float:  # type: ignore[type-arg]
            right = [p for p in range(8) if p not in left]
            return float(count[np.ix_(left, left)].sum() + count[np.ix_(right, right)].sum())

        found = coactive_groups(on, 2, rng, iterations=20)
        left, right = (tuple(members.tolist()) for members in found.members_KN)
        own = within(left)
        assert found.objective[-1] == pytest.approx(own / count.sum())
        assert all(b > a for a, b in itertools.pairwise(found.objective[:-1]))
        for out, back in itertools.product(left, right):
            swapped = tuple(back if p == out else p for p in left)
            assert within(swapped) <= own
        best_found += own == max(map(within, itertools.combinations(range(8), 4)))
    assert best_found >= 7


def test_neurons_that_are_never_active_find_a_place() -> None:
    on = torch.zeros(10, 8, dtype=torch.bool)
    on[:, 0] = True
    for found in (
        hot_clusters(on, 4, iterations=3),
        coactive_groups(on, 4, np.random.default_rng(0), iterations=3),
    ):
        assert sorted(found.members_KN.ravel()) == list(range(8))


def test_a_linear_rule_is_learnt() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = torch.randn(5, 6, generator=generator)
    x, fresh = (torch.randn(n, 6, generator=generator) * 3 for n in (2000, 500))
    rows = fit_router(x, x @ rule.T, 2, ridge=1e-5)
    assert recall(fresh.double() @ rows.T, fresh @ rule.T, 2) > 0.97
    assert float(rows.sum(dim=0).abs().max()) < 1e-9
    assert not fit_router(x, x @ rule.T, 5, ridge=1e-5).any()


def test_the_fit_is_the_minimum() -> None:
    """The gradient of the stated objective vanishes, whatever the size of the inputs."""
    generator = torch.Generator().manual_seed(1)
    x, scores = torch.randn(60, 4, generator=generator) * 7, torch.randn(60, 3, generator=generator)
    rows = fit_router(x, scores, 2, ridge=0.01)
    size = float(x.double().square().mean().sqrt())
    free = (rows * size).requires_grad_()
    logits = (x.double() / size) @ free.T
    loss = 0.005 * free.square().sum()
    for token, row in enumerate(scores.topk(2).indices.tolist()):
        (other,) = set(range(3)) - set(row)
        for expert in row:
            loss = (
                loss - (logits[token, expert] - logits[token, [expert, other]].logsumexp(0)) / 120
            )
    loss.backward()
    assert free.grad is not None
    assert float(free.grad.abs().max()) < 1e-5
    assert torch.allclose(rows, fit_router(x * 100, scores, 2, ridge=0.01) * 100, atol=1e-6)


def test_recall_by_hand() -> None:
    scores = torch.tensor([[3.0, 2, 1, 0], [0.0, 1, 2, 3]])
    reference = torch.tensor([[3.0, 0, 2, 1], [0.0, 1, 2, 3]])
    assert recall(scores, reference, 2) == 0.75
    assert chosen(torch.ones(1, 3), 2).tolist() == [[True, True, False]]
