"""Truncation that minimises the loss on a layer's outputs instead of on its weights.

For a layer y = W x with inputs X [T, N] and C = X^T X, the matrix W' of rank R that minimises
||X (W - W')^T||_F is U U^T W with U the leading eigenvectors of W C W^T. That is SVD-LLM's
(arXiv:2403.07378) result without its Cholesky factor and its inverse: C may be singular. C = I gives the plain
truncation.
"""

from __future__ import annotations

import torch

from ..errors import InputError, UsageError
from .lowrank import LowRank, check_rank
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
    wide_MN, c_NN = matrix_MN.double(), gram_NN.double()
    c_NN = (c_NN + c_NN.T) / 2
    if damping:
        c_NN = c_NN + damping * c_NN.diagonal().mean() * torch.eye(columns, dtype=c_NN.dtype)
    # Two decompositions of N against one of M.
    left_MR, values = (
        _on_the_input_side(wide_MN, c_NN, rank)
        if rows**3 > 2 * columns**3
        else _on_the_output_side(wide_MN, c_NN, rank)
    )
    total, kept = float(values.sum()), float(values[:rank].sum())
    return LowRank(left_MR, left_MR.T @ wide_MN, max(0.0, total - kept) ** 0.5, total**0.5)


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
