"""Low rank plus rows: identities, the best choice of rows, and planted matrices."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from moesurg.surgery.linalg.lowrank import truncate
from moesurg.surgery.linalg.row_sparse import split


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_no_rows_is_the_decomposition_and_all_rows_or_directions_are_exact(
    shape: tuple[int, int],
) -> None:
    matrix = normal(*shape)
    plain = split(matrix, 3, 0)
    assert plain.rows == ()
    assert torch.equal(plain.matrix_MN, truncate(matrix, 3).product())
    assert plain.error == pytest.approx(truncate(matrix, 3).relative_error)
    assert torch.equal(split(matrix, 3, shape[0]).matrix_MN, matrix)
    assert torch.equal(split(matrix, 7, 0).matrix_MN, matrix)
    assert split(matrix, 0, 2).error < 1


def test_no_other_rows_lose_less() -> None:
    matrix = normal(6, 5)
    residual = matrix - truncate(matrix, 2).product()
    found = split(matrix, 2, 2)
    losses = {
        rows: float(residual[[row for row in range(6) if row not in rows]].norm())
        for rows in combinations(range(6), 2)
    }
    assert found.rows == min(losses, key=lambda rows: losses[rows])
    assert found.error == pytest.approx(min(losses.values()) / float(matrix.norm()))
    assert torch.equal(found.matrix_MN[list(found.rows)], matrix[list(found.rows)])


def test_error_falls_with_rank_rows_and_refits() -> None:
    matrix = normal(20, 16)
    for steps in ([(r, 3, 0) for r in range(6)], [(3, s, 0) for s in range(20)]):
        errors = [split(matrix, *step).error for step in steps]
        assert errors == sorted(errors, reverse=True)
    errors = [split(matrix, 3, 4, refits).error for refits in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < errors[0]


def test_refits_recover_a_planted_sum() -> None:
    matrix = normal(30, 3) @ normal(3, 20, seed=1)
    rows = [4, 11, 29]
    matrix[rows] += 50 * normal(3, 20, seed=2)
    assert split(matrix, 3, 3).error > 0.01
    found = split(matrix, 3, 3, refits=3)
    assert found.rows == tuple(rows)
    assert found.error < 1e-7
