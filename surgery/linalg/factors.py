"""Linear algebra of products B A that never forms them.

Shapes: E matrices at once (stacked experts, or one), A [E, r, n], B [E, m, r], float64.
"""

from __future__ import annotations

import torch

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [E, r, n] and B [E, m, r]."""


def inner(first: Factors, second: Factors) -> torch.Tensor:
    """Frobenius inner products of the products, [E]: trace of (B1ᵀ B2) (A2 A1ᵀ)."""
    (down_1, up_1), (down_2, up_2) = first, second
    return ((up_1.mT @ up_2) * (down_1 @ down_2.mT)).sum(dim=(1, 2))


def relative_error(found: Factors, target: Factors) -> float:
    """‖found - target‖ / ‖target‖ over all E products; 0 if both are zero, 1 if the target alone is.

    The difference is one product of stacked factors, whose norm is taken from their triangular factors: the sum
    of three inner products would lose half the digits.
    """
    size = norm(target)
    down = torch.cat([found[0], target[0]], dim=1)
    up = torch.cat([found[1], -target[1]], dim=2)
    difference = norm((down, up))
    if size == 0:
        return 0.0 if difference == 0 else 1.0
    return difference / size


def norm(factors: Factors) -> float:
    """Frobenius norm of all products together."""
    return float(torch.linalg.vector_norm(core(factors)))


def core(factors: Factors) -> torch.Tensor:
    """R_B R_Aᵀ [E, p, q] of the QR decompositions of B and Aᵀ: same singular values as B A."""
    down, up = factors
    left: torch.Tensor = torch.linalg.qr(up, mode="r").R
    right: torch.Tensor = torch.linalg.qr(down.mT, mode="r").R
    return left @ right.mT


def effective_rank(down: torch.Tensor, up: torch.Tensor) -> float:
    """Exp of the entropy of the normalised singular values, the mean over the E products; 0 for zero."""
    values = torch.linalg.svdvals(core((down, up)))
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum(dim=-1).exp().mean()) if values.any() else 0.0


def svd(factors: Factors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin SVD of B A through QR of both factors and an SVD of the small core.

    Returns:
        U [E, m, k], S [E, k] descending, Vᵀ [E, k, n], with k the smallest of m, n and r. The largest entry of each
        right vector is positive.
    """
    down, up = factors
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.mT)
    u, s, vt = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    u, vt = left @ u, vt @ right.mT
    peak = vt.abs().argmax(dim=-1, keepdim=True)
    sign = torch.where(vt.gather(-1, peak) < 0, -1.0, 1.0)
    return u * sign.mT, s, vt * sign


def truncated(factors: Factors, rank: int) -> Factors:
    """The nearest products of a rank (Eckart and Young), with the root of the singular values on each side."""
    u, s, vt = svd(factors)
    root = s[:, :rank].sqrt()
    return vt[:, :rank] * root[:, :, None], u[:, :, :rank] * root[:, None, :]
