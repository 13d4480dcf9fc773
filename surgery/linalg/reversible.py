"""Several sets of low-rank factors in one basis, from which each can be rebuilt (Reversible Model Merging).

Shapes: T adapters; E matrices of a module; A [E, r, n], B [E, m, r]. A position is a column of A or a row of B, P =
E (n + m) of them, each an r-vector of every adapter: X [P, r, T]. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .factors import Factors


@dataclass(frozen=True)
class Basis:
    """An affine fit of X: x_i = mean + basis z_i at every position.

    Attributes:
        mean_PR: over the adapters.
        basis_PRK: directions, strongest first; orthonormal at every position, or over all of them.
        coefficients: [P, K, T], or [K, T] where all positions share them.
        tails: relative Frobenius error of X with 0, 1, ... directions.
    """

    mean_PR: torch.Tensor
    basis_PRK: torch.Tensor
    coefficients: torch.Tensor
    tails: list[float]

    def rebuild(self, task: int, directions: int | None = None) -> torch.Tensor:
        """The positions [P, r] of one adapter, from the leading directions or all."""
        return rebuild(
            self.mean_PR,
            self.basis_PRK[..., :directions],
            self.coefficients[..., :directions, task],
        )


def rebuild(
    mean_PR: torch.Tensor, basis_PRK: torch.Tensor, coefficients: torch.Tensor
) -> torch.Tensor:
    """The mean plus basis z, with z [P, K], or [K] where all positions share it."""
    each = coefficients.dim() == 2
    product = basis_PRK @ coefficients[..., None] if each else (basis_PRK @ coefficients)[..., None]
    return mean_PR + product[..., 0]


def fit(positions_PRT: torch.Tensor, directions: int, *, shared: bool) -> Basis:
    """The best affine fit with a number of directions (principal components, Eckart and Young).

    Args:
        directions: at most; min(r, T - 1) at every position, or T - 1 for all together, lose nothing.
        shared: whether one set of coefficients serves all positions.
    """
    mean = positions_PRT.mean(dim=-1)
    centred = positions_PRT - mean[..., None]
    places, rank, tasks = centred.shape
    flat = centred.reshape(1, places * rank, tasks) if shared else centred
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    peak = left.abs().argmax(dim=-2, keepdim=True)
    sign = torch.where(left.gather(-2, peak) < 0, -1.0, 1.0)
    # The last singular value of T centred columns is zero.
    kept = min(directions, values.shape[-1], max(0, tasks - 1))
    basis = (left * sign)[..., :kept]
    coefficients = values[..., :kept, None] * (right * sign.mT)[..., :kept, :]
    squares = values.square().sum(dim=0)
    total = float(positions_PRT.square().sum())
    tails = [
        float((squares[count:].sum() / total).clamp_min(0).sqrt()) if total else 0.0
        for count in range(len(squares) + 1)
    ]
    return Basis(
        mean,
        basis.reshape(places, rank, kept),
        coefficients[0] if shared else coefficients,
        tails,
    )


def to_positions(factors: Factors) -> torch.Tensor:
    """[P, r]: the columns of A, then the rows of B."""
    down, up = factors
    rank = down.shape[1]
    return torch.cat([down.mT.reshape(-1, rank), up.reshape(-1, rank)])


def to_factors(positions_PR: torch.Tensor, experts: int, inputs: int, outputs: int) -> Factors:
    """A [E, r, n] and B [E, m, r] from their positions."""
    rank = positions_PR.shape[1]
    down, up = positions_PR[: experts * inputs], positions_PR[experts * inputs :]
    return down.reshape(experts, inputs, rank).mT, up.reshape(experts, outputs, rank)


def turn(factors: Factors, reference: Factors) -> torch.Tensor:
    """The rotation Q [E, r, r] that brings an adapter's ranks to those of another (Procrustes).

    Q = argmin over orthogonal Q of |Q A - A_ref|^2 + |B Q^T - B_ref|^2 = U V^T,   A_ref A^T + B_ref^T B = U S V^T
    """
    down, up = factors
    left, _, right = torch.linalg.svd(reference[0] @ down.mT + reference[1].mT @ up)
    found: torch.Tensor = left @ right
    return found


def turned(factors: Factors, rotation: torch.Tensor) -> Factors:
    """(Q A, B Q^T), the same product."""
    return rotation @ factors[0], factors[1] @ rotation.mT


def padded(factors: Factors, rank: int) -> Factors:
    """Factors with rows and columns of zeros up to a rank."""
    down, up = factors
    lacking = rank - down.shape[1]
    return (
        torch.cat([down, down.new_zeros(down.shape[0], lacking, down.shape[2])], dim=1),
        torch.cat([up, up.new_zeros(up.shape[0], up.shape[1], lacking)], dim=2),
    )


def root_mean_square(errors: Sequence[float]) -> float:
    """Of relative errors."""
    return math.sqrt(sum(error * error for error in errors) / max(1, len(errors)))
