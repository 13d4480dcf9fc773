"""Linear algebra of products B A that never forms them.

Shapes: E matrices at once (stacked experts, or one), A [E, r, n], B [E, m, r], float64.
"""

from __future__ import annotations

import math

import torch

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [E, r, n] and B [E, m, r]."""
CANCELLED = 1e-6
"""Part of the square of the sum of all ranks' norms below which a squared norm from Gram matrices has lost digits."""
DEAD = 1e-12
"""Part of the largest rank's norm up to which a rank counts as contributing nothing."""


def inner(first: Factors, second: Factors) -> torch.Tensor:
    """Frobenius inner products of the products, [E]: trace of (B1ᵀ B2) (A2 A1ᵀ)."""
    (down_1, up_1), (down_2, up_2) = first, second
    return ((up_1.mT @ up_2) * (down_1 @ down_2.mT)).sum(dim=(1, 2))


def relative_error(found: Factors, target: Factors) -> float:
    """‖found - target‖ / ‖target‖ over all E products; 0 if both are zero, 1 if the target alone is.

    The difference is one product of stacked factors: the sum of three inner products would lose half the digits.
    """
    if all(torch.equal(mine, other) for mine, other in zip(found, target, strict=True)):
        return 0.0
    size = norm(target)
    down = torch.cat([found[0], target[0]], dim=1)
    up = torch.cat([found[1], -target[1]], dim=2)
    difference = norm((down, up))
    if size == 0:
        return 0.0 if difference == 0 else 1.0
    return difference / size


def rounding_error(found: Factors, rounded: Factors, size: float | None = None) -> float:
    """‖rounded - found‖ / ‖found‖ of factors that differ by a cast alone; 0 if found is zero.

    B A - B' A' = (B - B') A + B' (A - A'), in which nothing large cancels. So the difference's norm is taken from
    Gram matrices in float32, to six digits, of factors that are scaled to 1.

    Args:
        size: ‖found‖ where it is known.
    """
    size = norm(found) if size is None else size
    down, up = found[0], rounded[1]
    lost_down, lost_up = found[0] - rounded[0], found[1] - rounded[1]
    peaks = [float(part.abs().max()) for part in (down, lost_up, lost_down, up)]
    # Both summands relative to the larger: nothing that counts is too small for float32.
    scales = peaks[0] * peaks[1], peaks[2] * peaks[3]
    largest = max(scales)
    if not size or not largest:
        return 0.0
    downs, ups = [], []
    for first, second, scale, one, other in (
        (down, lost_up, scales[0], peaks[0], peaks[1]),
        (lost_down, up, scales[1], peaks[2], peaks[3]),
    ):
        if scale:
            downs.append((first / one).float())
            ups.append((second * (scale / largest / other)).float())
    scaled = torch.cat(downs, dim=1), torch.cat(ups, dim=2)
    square = float(inner(scaled, scaled).sum(dtype=torch.float64))
    bound = float(_sizes(scaled).sum(dim=-1).square().sum(dtype=torch.float64))
    if square > 1e-2 * bound / scaled[0].shape[1]:
        return math.sqrt(square) * largest / size
    wide = torch.cat([down, lost_down], dim=1), torch.cat([lost_up, up], dim=2)
    return norm(wide) / size


def dead(factors: Factors) -> int:
    """How many ranks contribute nothing: ‖a_j‖ ‖b_j‖ at most `DEAD` of the largest of their matrix."""
    sizes = _sizes(factors)
    return int((sizes <= DEAD * sizes.amax(dim=-1, keepdim=True)).sum())


def norm(factors: Factors) -> float:
    """Frobenius norm of all products together, to about ten digits.

    From Gram matrices of the factors where the ranks do not cancel, from their QR decompositions, which take several
    times as long, where they do.
    """
    square = float(inner(factors, factors).sum())
    # Products are sums over ranks of norm |a_j| |b_j|; what rounding adds to the square is relative to the sum's.
    bound = float(_sizes(factors).sum(dim=-1).square().sum())
    if square > CANCELLED * bound:
        return math.sqrt(square)
    return float(torch.linalg.vector_norm(core(factors)))


def _sizes(factors: Factors) -> torch.Tensor:
    """‖a_j‖ ‖b_j‖ of every rank, [E, r]."""
    down, up = factors
    sizes: torch.Tensor = torch.linalg.vector_norm(down, dim=2)
    sizes = sizes * torch.linalg.vector_norm(up, dim=1)
    return sizes


def core(factors: Factors) -> torch.Tensor:
    """R_B R_Aᵀ [E, p, q] of the QR decompositions of B and Aᵀ: same singular values as B A."""
    down, up = factors
    left: torch.Tensor = torch.linalg.qr(up, mode="r").R
    right: torch.Tensor = torch.linalg.qr(down.mT, mode="r").R
    return left @ right.mT


def effective_rank(down: torch.Tensor, up: torch.Tensor) -> float:
    """Exp of the entropy of the normalised singular values, the mean over the E products; 0 for zero."""
    return entropy_rank(torch.linalg.svdvals(core((down, up))))


def entropy_rank(values: torch.Tensor) -> float:
    """The same from singular values [E, k]."""
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
