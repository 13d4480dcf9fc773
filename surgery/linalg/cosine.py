"""A matrix by its coefficients on some vectors of the orthonormal cosine transform (DCT-II)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import UsageError


@dataclass(frozen=True)
class Spectral:
    """``coefficients @ basis`` (inputs: [M, R] and [R, N]) or ``basis.T @ coefficients`` (outputs: [R, N]).

    Attributes:
        frequencies_R: which vectors of the transform, ascending, int64.
        error: Frobenius norm of what is lost.
    """

    side: str
    coefficients: torch.Tensor
    frequencies_R: torch.Tensor
    size: int
    error: float

    def dense(self) -> torch.Tensor:
        """The matrix this stands for, float64."""
        basis = cosine_basis(self.size)[self.frequencies_R]
        if self.side == "input":
            return self.coefficients @ basis
        return basis.T @ self.coefficients


def cosine_basis(size: int) -> torch.Tensor:
    """The transform as an orthonormal matrix [size, size], float64, lowest frequency in the first row."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


def select(matrix_MN: torch.Tensor, rank: int, side: str) -> Spectral:
    """The ``rank`` vectors with the most energy, which for an orthonormal basis lose least.

    Args:
        side: ``input`` transforms rows of the matrix, ``output`` columns.

    Raises:
        UsageError: an unknown side or an impossible rank.
    """
    if side not in ("input", "output") or not 1 <= rank <= matrix_MN.shape[side == "input"]:
        raise UsageError(f"rank {rank} is not one of the {side} side of {list(matrix_MN.shape)}")
    wide_MN = matrix_MN.double()
    size = wide_MN.shape[side == "input"]
    basis = cosine_basis(size)
    turned = wide_MN @ basis.T if side == "input" else basis @ wide_MN
    energy = turned.square().sum(dim=0 if side == "input" else 1)
    order = energy.sort(descending=True, stable=True)
    kept = order.indices[:rank].sort().values
    coefficients = turned[:, kept] if side == "input" else turned[kept]
    lost = float(order.values[rank:].sum()) ** 0.5
    return Spectral(side, coefficients.contiguous(), kept, size, lost)
