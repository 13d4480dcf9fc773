"""One choice among all pairs of factors with the same product.

B A = (B G⁻¹)(G A) for every invertible G, so whatever looks at A and B apart depends on G. Shapes: A [r, n], B [m, r],
float64.
"""

from __future__ import annotations

import torch

from .factors import svd

Pair = tuple[torch.Tensor, torch.Tensor]
"""A [r, n] and B [m, r]."""

DEAD = 1e-12
"""Ranks whose share of the largest |a||b| is below this contribute nothing."""


def alive(pair: Pair) -> tuple[Pair, int]:
    """The pair without ranks that contribute nothing, and how many were dropped."""
    down, up = pair
    sizes = down.norm(dim=1) * up.norm(dim=0)
    kept = sizes > DEAD * sizes.max() if len(sizes) else sizes > 0
    return (down[kept], up[:, kept]), int((~kept).sum())


def balance(pair: Pair) -> Pair:
    """Every rank with |a| = |b|; a rank that is zero on one side becomes zero on both."""
    down, up = pair
    first, second = down.norm(dim=1), up.norm(dim=0)
    scale = (first * second).sqrt()
    return (
        down * (scale / first.clamp_min(1e-300))[:, None],
        up * (scale / second.clamp_min(1e-300)),
    )


def fix_signs(pair: Pair) -> Pair:
    """Every rank with the largest entry of a positive."""
    down, up = pair
    if not len(down):
        return pair
    peak = down.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(down.gather(1, peak)[:, 0] < 0, -1.0, 1.0).to(down.dtype)
    return down * sign[:, None], up * sign


def canonical(pair: Pair) -> Pair:
    """Ranks by singular value, its root on each side, signs fixed: unique where the singular values differ."""
    u, s, vt = svd((pair[0][None], pair[1][None]))
    root = s[0].sqrt()
    return vt[0] * root[:, None], u[0] * root


def procrustes(pair: Pair, reference: Pair) -> tuple[Pair, torch.Tensor]:
    """The orthogonal change of ranks that comes closest to a reference of the same rank.

        Q = argmin |Q A - A_ref|² + |B Qᵀ - B_ref|²,   from the SVD of A_ref Aᵀ + B_refᵀ B

    Returns:
        (Q A, B Qᵀ) and Q [r, r].
    """
    (down, up), (down_ref, up_ref) = pair, reference
    u, _, vt = torch.linalg.svd(down_ref @ down.T + up_ref.T @ up)
    rotation = u @ vt
    return (rotation @ down, up @ rotation.T), rotation
