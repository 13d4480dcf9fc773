"""Truncation that minimises the loss on a layer's outputs instead of on its weights.

For a layer y = W x with inputs X [T, N] and C = X^T X, the matrix W' of rank R that minimises
||X (W - W')^T||_F is U U^T W with U the leading eigenvectors of W C W^T. That is SVD-LLM's
(arXiv:2403.07378) result without its Cholesky factor and its inverse: C may be singular. C = I gives the plain
truncation.
"""

from __future__ import annotations

import torch

from ..errors import InputError, UsageError
from .lowrank import LowRank, check_rank, truncate
from .svd import orient


def truncate_whitened(
    matrix_MN: torch.Tensor, gram_NN: torch.Tensor, rank: int, *, damping: float = 0.0
) -> LowRank:
    """The matrix of a rank whose outputs on the inputs behind a Gram matrix are closest.

    A matrix with far more rows than columns is treated on its input side: with C = L L^T, the leading
    eigenvectors V of L^T W^T W L give U as the orthonormal basis of W L V.

    Args:
        matrix_MN: W.
        gram_NN: C, positive semi-definite; any scale.
        damping: multiple of the mean of C's diagonal that is added to it; decides what is kept in
            directions the text never showed.

    Returns:
        Factors in float64, the left one orthonormal; error and norm are ||X (W - W')^T|| and ||X W^T||
        with the damped C.

    Raises:
        UsageError: shapes or rank do not fit.
        InputError: a value is not finite.
    """
    check_rank(matrix_MN, rank)
    rows, columns = matrix_MN.shape
    if gram_NN.shape != (columns, columns):
        raise UsageError(
            f"a Gram matrix of shape {list(gram_NN.shape)} is not one of inputs of {columns}"
        )
    wide_MN, c_NN = matrix_MN.double(), damped(gram_NN, damping)
    # Two decompositions of N against one of M.
    left_MR, values = (
        _on_the_input_side(wide_MN, c_NN, rank)
        if rows**3 > 2 * columns**3
        else _on_the_output_side(wide_MN, c_NN, rank)
    )
    total, kept = float(values.sum()), float(values[:rank].sum())
    return LowRank(left_MR, left_MR.T @ wide_MN, max(0.0, total - kept) ** 0.5, total**0.5)


def damped(gram_NN: torch.Tensor, damping: float) -> torch.Tensor:
    """A Gram matrix, float64 and symmetric, with a multiple of its mean diagonal added to the diagonal."""
    c_NN = gram_NN.double()
    c_NN = (c_NN + c_NN.T) / 2
    if damping:
        size = len(c_NN)
        c_NN = c_NN + damping * c_NN.diagonal().mean() * torch.eye(size, dtype=c_NN.dtype)
    return c_NN


def whitened_values(
    matrix_MN: torch.Tensor, gram_NN: torch.Tensor, *, damping: float = 0.0
) -> torch.Tensor:
    """Singular values of X W^T for the inputs X behind a Gram matrix, largest first: float64 [min(M, N)].

    Their squares' tail is the squared loss of :func:`truncate_whitened` at a rank.
    """
    wide_MN, c_NN = matrix_MN.double(), damped(gram_NN, damping)
    if wide_MN.shape[0] > wide_MN.shape[1]:
        strengths, axes = torch.linalg.eigh(_finite(c_NN))
        seen_MN = wide_MN @ (axes * strengths.clamp_min(0).sqrt())
        product = seen_MN.T @ seen_MN
    else:
        product = wide_MN @ c_NN @ wide_MN.T
    values: torch.Tensor = torch.linalg.eigvalsh(_finite((product + product.T) / 2))
    return values.flip(0).clamp_min(0).sqrt()


def truncate_scaled(matrix_MN: torch.Tensor, scale_N: torch.Tensor, rank: int) -> LowRank:
    """The matrix of a rank closest to W in the norm of (W - W') diag(d).

    Args:
        scale_N: d, not negative; a zero counts as the smallest of the others (as 1 where all are zero), so that the
            scaling can be undone.

    Returns:
        Error and norm are of the scaled matrices.

    Raises:
        UsageError: shapes or rank do not fit.
        InputError: a value is not finite.
    """
    check_rank(matrix_MN, rank)
    if scale_N.shape != matrix_MN.shape[1:]:
        raise UsageError(
            f"a scale of shape {list(scale_N.shape)} is not one of inputs of {matrix_MN.shape[1]}"
        )
    wide_N = _finite(scale_N.double())
    used_N = wide_N[wide_N > 0]
    wide_N = wide_N.clamp_min(float(used_N.min()) if len(used_N) else 1.0)
    found = truncate(matrix_MN.double() * wide_N, rank)
    return LowRank(found.left_MR, found.right_RN / wide_N, found.error, found.norm)


def truncate_shifted(
    matrix_MN: torch.Tensor,
    gram_NN: torch.Tensor,
    cross_NN: torch.Tensor,
    rank: int,
    *,
    damping: float = 0.0,
    share: float = 1.0,
) -> LowRank:
    """The matrix of a rank that makes of shifted inputs what W made of the original ones.

    Minimises ||X W^T - Y W'^T||_F over W' of rank R, with X [T, N] the original inputs and Y those that a changed
    model gives. Without a bound on the rank W* = W (X^T Y) (Y^T Y)^-1 is the least-squares solution; the loss of any
    W' is that of W* plus ||Y (W* - W')^T||^2, so that W' is the whitened truncation of W* (the closed form of AA-SVD,
    arXiv:2604.02119, which multiplies by the inverse of a Cholesky factor instead). Damping pulls W* to W where Y says
    nothing: both sides get a multiple of the identity. A share below 1 asks for a mixture of what W made of X and what
    it makes of Y, which goes that part of the way from W to W* whatever Y says.

    Args:
        gram_NN: Y^T Y.
        cross_NN: X^T Y.
        damping: multiple of the mean of the Gram matrix's diagonal added to both.
        share: of X in the inputs share X + (1 - share) Y whose outputs are wanted, 0 to 1; 0 gives the whitened
            truncation on Y.

    Returns:
        Error and norm are ||Y (W* - W')^T|| and ||Y W*^T||: the part that the rank decides.

    Raises:
        UsageError: shapes or rank do not fit.
        InputError: a value is not finite.
    """
    check_rank(matrix_MN, rank)
    size = matrix_MN.shape[1]
    if gram_NN.shape != (size, size) or cross_NN.shape != (size, size):
        raise UsageError(
            f"Gram matrices of shape {list(gram_NN.shape)} and {list(cross_NN.shape)} are not of inputs of {size}"
        )
    c_NN = _finite(gram_NN.double())
    c_NN = (c_NN + c_NN.T) / 2
    k_NN = share * _finite(cross_NN.double()) + (1 - share) * c_NN
    if damping:
        ridge_NN = damping * c_NN.diagonal().mean() * torch.eye(size, dtype=c_NN.dtype)
        c_NN, k_NN = c_NN + ridge_NN, k_NN + ridge_NN
    target_MN = _solved(matrix_MN.double() @ k_NN, c_NN)
    return truncate_whitened(target_MN, c_NN, rank)


def _solved(product_MN: torch.Tensor, c_NN: torch.Tensor) -> torch.Tensor:
    """P C^+ of least norm: by a Cholesky factor where C is safely definite (tenfold faster), else by eigenvectors.

    A Gram matrix of fewer tokens than inputs is singular, and one that was stored in float32 can be indefinite.
    """
    lower_NN, failed = torch.linalg.cholesky_ex(c_NN)
    pivots_N = lower_NN.diagonal()
    # The factor's diagonal bounds the condition from below only; 1e-4 of the largest is 1e-8 of C.
    if not bool(failed) and float(pivots_N.min()) > 1e-4 * float(pivots_N.max()):
        return torch.cholesky_solve(product_MN.T, lower_NN).T
    strengths_N, axes_NN = torch.linalg.eigh(c_NN)
    floor = float(strengths_N[-1].clamp_min(0)) * len(c_NN) * torch.finfo(torch.float64).eps
    inverse_N = torch.where(strengths_N > floor, 1 / strengths_N.clamp_min(floor or 1.0), 0.0)
    fit_MN: torch.Tensor = (product_MN @ axes_NN) * inverse_N @ axes_NN.T
    return fit_MN


def _on_the_output_side(
    wide_MN: torch.Tensor, c_NN: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    product_MM = _finite(wide_MN @ c_NN @ wide_MN.T)
    values, vectors = torch.linalg.eigh((product_MM + product_MM.T) / 2)
    return orient(vectors.flip(1)[:, :rank]), values.flip(0).clamp_min(0)


def _on_the_input_side(
    wide_MN: torch.Tensor, c_NN: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    strengths, axes = torch.linalg.eigh(_finite(c_NN))
    root_NN = axes * strengths.clamp_min(0).sqrt()
    seen_MN = wide_MN @ root_NN
    values, vectors = torch.linalg.eigh(_finite(seen_MN.T @ seen_MN))
    basis_MR = torch.linalg.qr(seen_MN @ vectors.flip(1)[:, :rank])[0]
    return orient(basis_MR), values.flip(0).clamp_min(0)


def _finite(matrix: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(matrix).all()):
        raise InputError("a matrix to factorise, or its Gram matrix, is not finite")
    return matrix
