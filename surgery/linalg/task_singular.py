"""Merging changes of matrices by their singular vectors: TSV-Merge and isotropic merging, exact on low rank.

Everything is float64. M counts rows, N columns, Q the directions of all tasks side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RTOL = 1e-6
"""Singular values below this part of the largest count as zero. Far above what float64 resolves through Gram
matrices (1e-8) and above the rounding of float32 inputs (1e-7)."""


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a matrix, largest first.

    Attributes:
        left_MQ, values_Q, right_QN: orthonormal columns, values, orthonormal rows.
    """

    left_MQ: torch.Tensor
    values_Q: torch.Tensor
    right_QN: torch.Tensor

    def product(self) -> torch.Tensor:
        """The matrix [M, N] that they make."""
        return self.left_MQ * self.values_Q @ self.right_QN


def triplets(matrix_MN: torch.Tensor, rank: int, *, rtol: float = RTOL) -> Triplets:
    """The leading singular triplets that are not zero.

    Args:
        matrix_MN: converted to float64.
        rank: how many at most.
        rtol: part of the largest value below which a value counts as zero.
    """
    left, values, right = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    top = float(values[0]) if len(values) else 0.0
    kept = min(rank, int((values > rtol * top).sum()))
    return Triplets(left[:, :kept], values[:kept], right[:kept])


def polar(columns_MQ: torch.Tensor, *, rtol: float = RTOL) -> torch.Tensor:
    """The nearest partial isometry U (U^T U)^(-1/2), the inverse taken on the span of the columns.

    Where columns are dependent, published code completes the factor with arbitrary orthonormal vectors; here the
    missing directions stay out.
    """
    values, vectors = torch.linalg.eigh(columns_MQ.T @ columns_MQ)
    kept = values > (rtol * float(values[-1].clamp_min(0).sqrt())) ** 2
    basis = vectors[:, kept]
    found: torch.Tensor = columns_MQ @ (basis * values[kept].rsqrt() @ basis.T)
    return found


def tsv_merge(parts: Sequence[Triplets]) -> torch.Tensor | None:
    """Task singular vectors made orthogonal across tasks and put together (arXiv:2412.00081).

        Delta = polar([U_1 ... U_T]) diag(S_1 ... S_T) polar([V_1 ... V_T])^T

    Tasks with orthogonal spaces add up; a task given T times gives itself.

    Returns:
        [M, N], or None where all parts are zero.
    """
    values = torch.cat([part.values_Q for part in parts])
    if not len(values):
        return None
    left = polar(torch.cat([part.left_MQ for part in parts], dim=1))
    right = polar(torch.cat([part.right_QN for part in parts]).T)
    return left * values @ right.T


def isotropic(matrix_MN: torch.Tensor, *, full: bool = False, rtol: float = RTOL) -> torch.Tensor:
    """The matrix with all its singular values replaced by their mean (Iso-C, arXiv:2502.04959).

    The sum of the singular values stays. The mean is over the values that are not zero; ``full`` takes it over all
    min(M, N) as the published code does, which fills directions that the matrix does not have.
    """
    left, values, right = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    kept = int((values > rtol * values[0]).sum()) if len(values) and float(values[0]) else 0
    if full and kept:
        kept = len(values)
    if not kept:
        return torch.zeros_like(left @ right)
    found: torch.Tensor = values.sum() / kept * (left[:, :kept] @ right[:kept])
    return found
