"""Matrices of three values, as BitNet b1.58 and MoTE have them, and four of their entries in a byte."""

from __future__ import annotations

import torch

SMALLEST = 1e-5
"""What the scale of a matrix is at least."""


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A matrix as a scale and entries of -1, 0 and 1.

    With alpha = max(mean |W|, 1e-5) over the whole matrix, codes are clip(round(W / alpha), -1, 1), halves rounded
    to even (arXiv:2402.17764). The mean is taken in float64.

    Returns:
        codes, int8 of the matrix's shape, and alpha.
    """
    alpha = max(float(matrix.double().abs().mean()), SMALLEST)
    codes = (matrix.double() / alpha).round_().clamp_(-1, 1)
    return codes.to(torch.int8), alpha


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes [..., N] as bytes [..., ceil(N / 4)].

    Each code takes two bits, as code + 1, the first one the lowest; what a row's last byte has left is zero codes.

    Raises:
        ValueError: an entry is not -1, 0 or 1.
    """
    if codes.numel() and not bool((codes.abs() <= 1).all()):
        raise ValueError("codes should be -1, 0 or 1")
    missing = -codes.shape[-1] % 4
    filled = torch.nn.functional.pad(codes.to(torch.int8), (0, missing)) + 1
    groups = filled.to(torch.uint8).reshape(*codes.shape[:-1], -1, 4)
    packed: torch.Tensor = (
        groups[..., 0] | groups[..., 1] << 2 | groups[..., 2] << 4 | groups[..., 3] << 6
    )
    return packed


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """The codes [..., columns] of :func:`pack`, int8."""
    parts = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return parts.flatten(-2)[..., :columns].to(torch.int8) - 1
