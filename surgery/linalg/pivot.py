"""A matrix of rank R as R of its own rows and the coefficients of all others.

PIFA (arXiv:2501.19090): R N + (M - R) R numbers instead of the R (M + N) of two factors, without loss, so
that every R below min(M, N) saves. The pivots come from a column-pivoted QR of the orthonormal basis of the left
factor, [R, M] instead of the whole matrix, which also keeps the coefficients small (about 1 in size).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import qr, solve_triangular


@dataclass(frozen=True)
class Pivoted:
    """Rows ``index_R`` (ascending) are ``rows_RN``; the others, in order, are ``coef_SR @ rows_RN``."""

    rows_RN: torch.Tensor
    coef_SR: torch.Tensor
    index_R: torch.Tensor

    def unpack(self) -> torch.Tensor:
        """The matrix [M, N] in the type of the rows."""
        kept, columns = self.rows_RN.shape
        size = kept + self.coef_SR.shape[0]
        pivots = self.index_R.long()
        others = torch.ones(size, dtype=torch.bool)
        others[pivots] = False
        matrix_MN = self.rows_RN.new_empty(size, columns)
        matrix_MN[pivots] = self.rows_RN
        matrix_MN[others] = self.coef_SR @ self.rows_RN
        return matrix_MN

    def cast(self, dtype: torch.dtype) -> Pivoted:
        """The numbers rounded to a type, the index as it is."""
        return Pivoted(self.rows_RN.to(dtype), self.coef_SR.to(dtype), self.index_R)


def pack(left_MR: torch.Tensor, right_RN: torch.Tensor) -> Pivoted:
    """The product of two factors by pivot rows. A left factor of lower rank than R is handled too."""
    wide_MR = left_MR.double()
    rank = wide_MR.shape[1]
    basis_MR = torch.linalg.qr(wide_MR)[0]
    triangle, order = qr(basis_MR.T.numpy(), mode="r", pivoting=True)
    pivots = torch.from_numpy(order[:rank].astype("int64")).sort()
    others = torch.from_numpy(order[rank:].astype("int64")).sort()
    # Rows of the basis: pivots are (Q T1)^T, others (Q T2)^T, so the coefficients are T2^T T1^-T.
    coef_RS = torch.from_numpy(solve_triangular(triangle[:, :rank], triangle[:, rank:]))
    coef_SR = coef_RS.T[others.indices][:, pivots.indices].contiguous()
    rows_RN = wide_MR[pivots.values] @ right_RN.double()
    return Pivoted(rows_RN, coef_SR, pivots.values.to(torch.int32))


def stored(rows: int, columns: int, rank: int) -> int:
    """Numbers the pivot form stores, its index included."""
    return rank * (rows + columns - rank) + rank
