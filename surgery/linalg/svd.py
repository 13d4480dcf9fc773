"""Singular vectors through the Gram matrix on the small side."""

from __future__ import annotations

import torch


def leading_left(gram_OO: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading left singular vectors of a matrix W from W Wᵀ.

    Args:
        gram_OO: symmetric positive semi-definite [O, O], float64.
        rank: how many, 1 to O; more than O gives all.

    Returns:
        [O, rank] float64, orthonormal columns, strongest first; the largest entry of each is positive.
    """
    _, vectors = torch.linalg.eigh((gram_OO + gram_OO.T) / 2)
    return orient(vectors.flip(1)[:, : min(rank, vectors.shape[1])])


def orient(vectors_OR: torch.Tensor) -> torch.Tensor:
    """Columns with their signs fixed: the largest entry of each is positive."""
    top = vectors_OR.abs().argmax(dim=0)
    signs = vectors_OR[top, torch.arange(vectors_OR.shape[1], device=vectors_OR.device)].sign()
    oriented: torch.Tensor = vectors_OR * torch.where(signs == 0, torch.ones_like(signs), signs)
    return oriented
