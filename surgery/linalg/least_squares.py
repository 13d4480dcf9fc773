"""Ridge least squares for the change of a matrix, from normal equations that are added up in blocks."""

from __future__ import annotations

import torch

from ..errors import InputError

BLOCK_ROWS = 1024
"""Rows that are converted to float64 at a time."""


def fit_change(design_NF: torch.Tensor, target_ND: torch.Tensor, ridge: float) -> torch.Tensor:
    """The C that minimises |target - design Cᵀ|² + r |C|², with r = ridge x mean diagonal of designᵀ design.

    Being a penalty on a change, the ridge pulls towards what is there already: where the design says nothing,
    nothing changes, and the error on the given rows never grows (C = 0 is among the candidates).

    With at least as many rows as columns the F x F normal equations are solved, otherwise the equal dual ones,
    N x N: Cᵀ = designᵀ (design designᵀ + r I)⁻¹ target.

    Args:
        design_NF: float32 or float64.
        target_ND: float64.
        ridge: 0 asks for plain least squares.

    Returns:
        [D, F] float64; zero where the design is.

    Raises:
        InputError: the system is singular: too small a ridge for dependent columns or too few rows.
    """
    rows, width = design_NF.shape
    starts = range(0, rows, BLOCK_ROWS)
    square = 0.0
    for start in starts:
        square += float(design_NF[start : start + BLOCK_ROWS].double().square().sum())
    if square == 0:
        return torch.zeros(target_ND.shape[1], width, dtype=torch.float64)
    added = ridge * square / width
    if ridge == 0 and rows < width:
        raise _singular(rows, width)
    if rows < width:
        wide_NF = design_NF.double()
        dual_NN = wide_NF @ wide_NF.T
        dual_NN.diagonal().add_(added)
        solved_ND: torch.Tensor = torch.cholesky_solve(target_ND, _factor(dual_NN, rows, width))
        return solved_ND.T @ wide_NF
    gram_FF = torch.zeros(width, width, dtype=torch.float64)
    cross_FD = torch.zeros(width, target_ND.shape[1], dtype=torch.float64)
    for start in starts:
        block = design_NF[start : start + BLOCK_ROWS].double()
        gram_FF.addmm_(block.T, block)
        cross_FD.addmm_(block.T, target_ND[start : start + BLOCK_ROWS])
    gram_FF.diagonal().add_(added)
    change_FD: torch.Tensor = torch.cholesky_solve(cross_FD, _factor(gram_FF, rows, width))
    return change_FD.T


def _factor(system: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    factor: torch.Tensor
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal().square()
    limit = len(system) * torch.finfo(torch.float64).eps * float(pivots.max())
    if int(failed) or float(pivots.min()) <= limit:
        raise _singular(rows, width)
    return factor


def _singular(rows: int, width: int) -> InputError:
    return InputError(
        f"least squares for {width} neurons on {rows} sampled inputs is singular",
        hint="use a larger ridge, or more calibration tokens and a larger --sample",
    )
