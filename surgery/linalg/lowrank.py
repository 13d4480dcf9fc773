"""The best approximation of a matrix by one of low rank, through a Gram matrix on its small side.

The Gram matrix is summed in float64 over blocks, so its noise is 1e-16 of the largest eigenvalue and singular
values are resolved down to about 1e-8 of the largest. The factors come from the original matrix and one
orthonormal basis, which keeps them accurate to the last bit of the basis whatever the Gram matrix lost. M
counts rows, N columns, R is the rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

from ..errors import InputError, UsageError
from .svd import orient

BLOCK = 1024
"""Rows or columns that are converted to float64 at a time."""

SINGLE_FROM = 256
"""Small side from which float32 decides on a basis; below, float64 costs nothing."""

SINGLE_BLOCK = 4096
"""Rows whose products float32 sums; the sums of such blocks are added in float64."""

SUBSET = 0.3
"""Fraction of the eigenvectors above which all of them cost less than the leading ones alone."""

SINGLE_LOSS = 1e-2
"""Squared relative error above which the noise of float32 in a Gram matrix cannot be seen in the result."""


@dataclass(frozen=True)
class LowRank:
    """A product of two factors, strongest direction first, so that a slice is a truncation.

    Attributes:
        left_MR, right_RN: float64; their product approximates the matrix.
        error: Frobenius norm of what is lost (for a whitened truncation: of the loss it minimises).
        norm: the same norm of the whole.
    """

    left_MR: torch.Tensor
    right_RN: torch.Tensor
    error: float
    norm: float

    @property
    def relative_error(self) -> float:
        """Error over norm; 0 for a zero matrix."""
        return self.error / self.norm if self.norm else 0.0

    @property
    def rank(self) -> int:
        return self.left_MR.shape[1]

    def product(self) -> torch.Tensor:
        """The approximation as a matrix."""
        return self.left_MR @ self.right_RN

    def balanced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors with each direction's strength split evenly, which rounds best in half precision."""
        left_R = torch.linalg.vector_norm(self.left_MR, dim=0)
        right_R = torch.linalg.vector_norm(self.right_RN, dim=1)
        usable = (left_R > 0) & (right_R > 0)
        scale_R = torch.where(usable, (right_R / left_R).sqrt(), 1.0)
        return self.left_MR * scale_R, self.right_RN / scale_R[:, None]


def gram(matrix_MN: torch.Tensor) -> torch.Tensor:
    """W^T W of a tall matrix, W W^T of a wide one: float64, on the small side.

    Raises:
        InputError: a value is not finite.
    """
    rows, columns = matrix_MN.shape
    size = min(rows, columns)
    total = torch.zeros(size, size, dtype=torch.float64, device=matrix_MN.device)
    for block in _blocks(matrix_MN if rows >= columns else matrix_MN.T):
        total.addmm_(block.T, block)
    if not bool(torch.isfinite(total).all()):
        raise InputError("a matrix to factorise holds a value that is not finite")
    return total


def singular_values(matrix_MN: torch.Tensor) -> torch.Tensor:
    """All singular values in float64, largest first; those below 1e-8 of the largest are noise."""
    values: torch.Tensor = torch.linalg.eigvalsh(gram(matrix_MN)).flip(0).clamp_min(0).sqrt()
    return values


def truncate(matrix_MN: torch.Tensor, rank: int) -> LowRank:
    """The closest matrix of a rank in the Frobenius norm.

    A large float32 or half-precision matrix is decomposed in float32, with the Gram matrix summed over blocks in
    float64 and the basis made orthonormal in float64. Where that leaves less than a hundredth of the squared norm, so
    that the noise of float32 could matter, everything is done again in float64. The excess over the optimal error is
    about 1e-10 on spectra of language models.

    Raises:
        UsageError: a rank that the matrix cannot have.
        InputError: a value is not finite.
    """
    check_rank(matrix_MN, rank)
    if matrix_MN.dtype != torch.float64 and min(matrix_MN.shape) >= SINGLE_FROM:
        found = _truncate_single(matrix_MN, rank)
        if found is not None:
            return found
    total = gram(matrix_MN)
    basis = orient(torch.linalg.eigh(total)[1].flip(1)[:, :rank])
    return _project(matrix_MN, basis, float(total.trace()))


def _truncate_single(matrix_MN: torch.Tensor, rank: int) -> LowRank | None:
    """The same from a decomposition in float32; None where its noise might matter.

    NumPy's and SciPy's products and eigenvectors (of the kept directions alone) take half of the time of torch's on
    the processors measured.
    """
    rows, columns = matrix_MN.shape
    tall_LS = (matrix_MN if rows >= columns else matrix_MN.T).float().cpu().numpy()
    size = tall_LS.shape[1]
    with as_torch():
        gram_SS = np.zeros((size, size))
        for start in range(0, len(tall_LS), SINGLE_BLOCK):
            block = tall_LS[start : start + SINGLE_BLOCK]
            gram_SS += block.T @ block  # BLAS sees the transpose and does half of the work
        largest = float(gram_SS.trace())
        if not 1e-20 < largest < 1e30:  # too near the ends of float32, or not finite
            return None
        few = {"driver": "evr", "subset_by_index": (size - rank, size - 1)}
        how: Any = few if rank <= SUBSET * size else {"driver": "evd"}
        # Transposed, in LAPACK's order of the elements; its reduction of the upper half is the faster one.
        single_SS = gram_SS.astype(np.float32).T
        found = scipy.linalg.eigh(
            single_SS, lower=False, overwrite_a=True, check_finite=False, **how
        )
        vectors = found[1][:, ::-1][:, :rank]
        basis_SR = vectors.astype(np.float64)
        # Orthonormal to 1e-6; one step of Newton and Schulz squares that. The correction is so small that float32 does.
        excess_RR = basis_SR.T @ basis_SR - np.eye(rank)
        basis_SR -= vectors @ (0.5 * excess_RR).astype(np.float32)
        basis = orient(torch.from_numpy(np.ascontiguousarray(basis_SR)))
        other_LR = torch.from_numpy(tall_LS @ basis.float().numpy()).double()
    total = float(torch.linalg.vector_norm(matrix_MN, dtype=torch.float64)) ** 2
    lost = total - float(other_LR.square().sum())
    if not lost > SINGLE_LOSS * total:
        return None
    factors = (other_LR, basis.T.contiguous())
    left_MR, right_RN = factors if rows >= columns else (basis, other_LR.T.contiguous())
    return LowRank(
        left_MR.to(matrix_MN.device), right_RN.to(matrix_MN.device), lost**0.5, total**0.5
    )


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


@contextmanager
def as_torch() -> Iterator[None]:
    """NumPy's and SciPy's linear algebra on as many threads as torch's, one in a unit: sums depend on that number."""
    with _libraries().limit(limits=torch.get_num_threads(), user_api="blas"):
        yield


def product(left_TM: torch.Tensor, right_TN: torch.Tensor) -> torch.Tensor:
    """X^T Y of one block of rows, float64 holding the sums of float32, for totals that are added in float64.

    On the processors measured NumPy's products take half of the time of torch's, and half of that again where both are
    one tensor. Elsewhere than on a CPU the product is torch's, in float64.
    """
    if left_TM.device.type != "cpu":
        return left_TM.double().T @ right_TN.double()
    left, right = left_TM.float().numpy(), right_TN.float().numpy()
    with as_torch():
        return torch.from_numpy(
            (left.T @ (left if right_TN is left_TM else right)).astype("float64")
        )


def truncate_randomised(
    matrix_MN: torch.Tensor,
    rank: int,
    rng: np.random.Generator,
    *,
    power: int = 4,
    oversample: float = 0.1,
) -> LowRank:
    """A nearly closest matrix from a random sketch of the range (Halko, Martinsson, Tropp 2011).

    Every product is orthonormalised by Householder reflections: a block that has been through W^T W is too
    ill-conditioned for normal equations.

    Args:
        rng: draws the sketch.
        power: iterations; the excess over the optimal error falls roughly as 1/(2 power + 1).
        oversample: further columns of the sketch as a fraction of the rank, at least 8.
    """
    check_rank(matrix_MN, rank)
    rows, columns = matrix_MN.shape
    width = min(rows, columns, rank + max(8, round(oversample * rank)))
    kind = torch.float64 if matrix_MN.dtype == torch.float64 else torch.float32
    matrix = matrix_MN.to(kind)
    if not bool(torch.isfinite(matrix).all()):
        raise InputError("a matrix to factorise holds a value that is not finite")
    sketch = torch.from_numpy(rng.standard_normal((columns, width))).to(matrix)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(power):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    inner_LN = (matrix.T @ basis).T.double()
    turn = orient(torch.linalg.eigh(inner_LN @ inner_LN.T)[1].flip(1)[:, :rank])
    left_MR, right_RN = basis.double() @ turn, turn.T @ inner_LN
    total = sum(float(block.square().sum()) for block in _blocks(matrix_MN))
    lost = max(0.0, total - float(right_RN.square().sum()))
    return LowRank(left_MR, right_RN, lost**0.5, total**0.5)


def check_rank(matrix_MN: torch.Tensor, rank: int) -> None:
    """Refuse a rank that a matrix cannot have."""
    if matrix_MN.ndim != 2 or not 1 <= rank <= min(matrix_MN.shape):
        raise UsageError(f"rank {rank} is not one of a matrix of shape {list(matrix_MN.shape)}")


def _project(matrix_MN: torch.Tensor, basis: torch.Tensor, total: float) -> LowRank:
    """Project on a basis of the small side. The error is what the other factor's norm lacks."""
    rows, columns = matrix_MN.shape
    if rows >= columns:
        other = torch.cat([block @ basis for block in _blocks(matrix_MN)])
        left_MR, right_RN = other, basis.T.contiguous()
    else:
        other = torch.cat([(block @ basis).T for block in _blocks(matrix_MN.T)], dim=1)
        left_MR, right_RN = basis, other
    lost = max(0.0, total - float(other.square().sum()))
    return LowRank(left_MR, right_RN, lost**0.5, total**0.5)


def _blocks(matrix_MN: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, matrix_MN.shape[0], BLOCK):
        yield matrix_MN[start : start + BLOCK].double()
