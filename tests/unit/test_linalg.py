"""Alignment and clustering against hand-made cases, SciPy and float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moesurg.surgery.linalg.clustering import inertia, kmeans, points_from_gram
from moesurg.surgery.linalg.permutation import align
from moesurg.surgery.linalg.svd import leading_left

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def expert(seed: int, width: int = 12, hidden: int = 7) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(width, hidden, generator=generator) for _ in range(2))
    return gate, up, torch.randn(hidden, width, generator=generator)


def permuted(source: Expert, order: torch.Tensor) -> Expert:
    return source[0][order], source[1][order], source[2][:, order]


def output(source: Expert, inputs_TD: torch.Tensor) -> torch.Tensor:
    gate, up, down = (matrix.double() for matrix in source)
    hidden = torch.nn.functional.silu(inputs_TD @ gate.T) * (inputs_TD @ up.T)
    return hidden @ down.T


def test_a_permuted_copy_is_recovered_bit_for_bit() -> None:
    reference = expert(0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    target = permuted(reference, order)
    found = align(reference, target)
    assert torch.equal(found.order_F, torch.argsort(order))
    for original, restored in zip(reference, permuted(target, found.order_F), strict=True):
        assert torch.equal(original, restored)
    assert found.before > 0.1
    assert found.after == pytest.approx(0.0, abs=1e-5)


def test_permuting_neurons_leaves_the_function_unchanged() -> None:
    source, inputs = expert(2), torch.randn(5, 7, dtype=torch.float64)
    order = torch.randperm(12)
    difference = output(source, inputs) - output(permuted(source, order), inputs)
    assert float(difference.abs().max()) < 1e-12


def test_largest_inner_product_is_smallest_distance() -> None:
    reference, target = expert(3, width=5), expert(4, width=5)
    found = align(reference, target)

    def distance(order: tuple[int, ...]) -> float:
        moved = permuted(target, torch.tensor(order))
        return sum(float((a - b).square().sum()) for a, b in zip(reference, moved, strict=True))

    best = min(itertools.permutations(range(5)), key=distance)
    assert tuple(found.order_F.tolist()) == best
    assert found.after <= found.before
    scale = sum(float(matrix.square().sum()) for matrix in reference)
    assert found.after == pytest.approx(distance(best) / scale, rel=1e-4)


def test_points_have_the_distances_of_the_originals() -> None:
    points = np.random.default_rng(0).normal(size=(6, 40))
    found = points_from_gram(points @ points.T)
    for i, j in itertools.combinations(range(6), 2):
        expected = np.linalg.norm(points[i] - points[j])
        assert np.linalg.norm(found[i] - found[j]) == pytest.approx(expected, rel=1e-9)


def test_kmeans_separates_two_far_pairs() -> None:
    assert kmeans(np.array([[0.0], [10.0], [1.0], [11.0]]), 2, seed=0) == [0, 1, 0, 1]


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 5])
def test_kmeans_of_identical_points_gives_every_cluster_a_member(clusters: int) -> None:
    labels = kmeans(np.zeros((5, 3)), clusters, seed=0)
    assert sorted(set(labels)) == list(range(clusters))
    assert inertia(np.zeros((5, 3)), labels) == 0.0


def test_kmeans_reaches_the_optimum_of_a_small_case() -> None:
    points = np.random.default_rng(5).normal(size=(7, 2))
    best = min(
        inertia(points, list(labels))
        for labels in itertools.product(range(3), repeat=7)
        if len(set(labels)) == 3
    )
    assert inertia(points, kmeans(points, 3, seed=1)) == pytest.approx(best, rel=1e-9)


def test_leading_left_vectors_are_those_of_the_svd() -> None:
    matrix = torch.randn(6, 9, dtype=torch.float64)
    found = leading_left(matrix @ matrix.T, 3)
    left, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.allclose(found.T @ found, torch.eye(3, dtype=torch.float64), atol=1e-12)
    expected = left[:, :3] @ left[:, :3].T
    assert torch.allclose(found @ found.T, expected, atol=1e-10)
