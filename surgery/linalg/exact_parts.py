"""A matrix as some of its columns and a matrix of low rank for the others.

M counts rows, N columns, S the columns kept, R is the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import UsageError
from .lowrank import LowRank, truncate


@dataclass(frozen=True)
class Split:
    """What was found.

    Attributes:
        index_S: the columns kept, ascending, int64.
        exact_MS: these columns as they are.
        rest: the others, in order, at rank R.
    """

    index_S: torch.Tensor
    exact_MS: torch.Tensor
    rest: LowRank

    @property
    def error(self) -> float:
        """Frobenius norm of what is lost, all of it in the rest."""
        return self.rest.error

    def dense(self) -> torch.Tensor:
        """The matrix [M, N] this stands for, float64."""
        size = self.exact_MS.shape[1] + self.rest.right_RN.shape[1]
        matrix_MN = self.rest.left_MR.new_empty(self.rest.left_MR.shape[0], size)
        matrix_MN[:, self.index_S] = self.exact_MS.double()
        matrix_MN[:, _others(self.index_S, size)] = self.rest.product()
        return matrix_MN


def split_columns(matrix_MN: torch.Tensor, rank: int, count: int, rounds: int = 3) -> Split:
    """Keep ``count`` columns and cut the others to a rank, so that little is lost.

    Alternates between the best subspace of rank R for the columns not kept and the columns furthest from it, neither
    of which can make the loss larger. Starts from the leading subspace of the whole matrix, which keeps the columns
    that fit it least, and from the largest columns, which could fill that subspace; the better end counts.

    Args:
        count: 0 gives the plain truncation.

    Raises:
        UsageError: a rank or number of columns that the matrix cannot have.
    """
    columns = matrix_MN.shape[1]
    if not 0 <= count < columns:
        raise UsageError(f"{count} of {columns} columns cannot be kept beside a matrix of low rank")
    wide_MN = matrix_MN.double()
    if not count:
        return _fit(wide_MN, torch.zeros(0, dtype=torch.long), rank)
    squares_N = wide_MN.square().sum(dim=0)
    full = truncate(wide_MN, min(rank, *wide_MN.shape))
    starts = [_furthest(wide_MN, squares_N, full, count), _top(squares_N, count)]
    best: Split | None = None
    for index_S in starts:
        found = _fit(wide_MN, index_S, rank)
        for _ in range(rounds - 1):
            moved_S = _furthest(wide_MN, squares_N, found.rest, count)
            if torch.equal(moved_S, found.index_S):
                break
            other = _fit(wide_MN, moved_S, rank)
            if other.error >= found.error:
                break
            found = other
        if best is None or found.error < best.error:
            best = found
    if best is None:
        raise UsageError("no start to split columns from")
    return best


def _fit(wide_MN: torch.Tensor, index_S: torch.Tensor, rank: int) -> Split:
    rest_MN = wide_MN[:, _others(index_S, wide_MN.shape[1])]
    return Split(index_S, wide_MN[:, index_S], truncate(rest_MN, rank))


def _furthest(
    wide_MN: torch.Tensor, squares_N: torch.Tensor, found: LowRank, count: int
) -> torch.Tensor:
    basis_MR = torch.linalg.qr(found.left_MR)[0]
    return _top(squares_N - (basis_MR.T @ wide_MN).square().sum(dim=0), count)


def _top(scores_N: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the largest, ascending; of equal ones the first."""
    order: torch.Tensor = scores_N.sort(descending=True, stable=True).indices[:count].sort().values
    return order


def _others(index_S: torch.Tensor, size: int) -> torch.Tensor:
    free = torch.ones(size, dtype=torch.bool)
    free[index_S] = False
    return free.nonzero()[:, 0]
