"""A matrix as low rank plus a few rows of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .lowrank import truncate


@dataclass(frozen=True)
class RowSparse:
    """W ≈ L + S, S nonzero in some rows only, so that the sum has exactly these rows of W.

    Attributes:
        matrix_MN: the sum, float64.
        rows: where S is not zero, ascending.
        error: Frobenius norm of what is lost, relative to that of W; 0 for a zero matrix.
    """

    matrix_MN: torch.Tensor
    rows: tuple[int, ...]
    error: float


def split(matrix_MN: torch.Tensor, rank: int, rows: int, refits: int = 0) -> RowSparse:
    """The closest matrix of a rank, and the rows of what it misses with the largest Euclidean norm.

    With ``refits`` the two are chosen in turn: the low-rank part is fitted to the other rows alone, which the kept
    ones, being exact, need not share, and rows are chosen again by what it then misses. That begins once from the
    decomposition and once from the rows of largest norm, since a few huge rows are what a decomposition represents
    first and misses least. The best of all rounds is returned, so that refits never do harm.

    Args:
        matrix_MN: of any floating type.
        rank: of L, 0 for none, at most min(M, N).
        rows: of S, 0 to M.
        refits: rounds after the first.
    """
    wide_MN = matrix_MN.double()
    norm = float(wide_MN.norm())
    best: RowSparse | None = None
    low_MN = first_MN = _truncated(wide_MN, rank)
    again = range(1, refits + 1)
    for start_MN, round_ in [
        (first_MN, 0),
        *((None if i > 1 else first_MN, i) for i in again),
        *((None if i > 1 else torch.zeros_like(wide_MN), i) for i in again),
    ]:
        low_MN = low_MN if start_MN is None else start_MN
        missed_M = (wide_MN - low_MN).norm(dim=1)
        kept = torch.argsort(missed_M, descending=True, stable=True)[:rows].sort().values
        others = torch.ones(len(wide_MN), dtype=torch.bool)
        others[kept] = False
        if round_ and bool(others.any()):
            low_MN = low_MN.clone()
            low_MN[others] = _truncated(wide_MN[others], rank)
        sum_MN = low_MN.clone()
        sum_MN[kept] = wide_MN[kept]
        error = float((wide_MN - sum_MN).norm()) / norm if norm else 0.0
        if best is None or error < best.error:
            best = RowSparse(sum_MN, tuple(kept.tolist()), error)
        if round_ and bool(others.any()):
            # What the new directions miss of the kept rows is what the next choice needs to know.
            basis = torch.linalg.svd(low_MN[others], full_matrices=False).Vh[:rank]
            low_MN[kept] = wide_MN[kept] @ basis.T @ basis
    if best is None:
        raise ValueError("refits should not be negative")
    return best


def _truncated(matrix_MN: torch.Tensor, rank: int) -> torch.Tensor:
    if not rank:
        return torch.zeros_like(matrix_MN)
    if rank >= min(matrix_MN.shape):
        return matrix_MN.clone()
    return truncate(matrix_MN, rank).product()
