"""Bases in which all changes of some low-rank adapters are small matrices, without loss (arXiv:2509.17786).

    V: orthonormal rows that span the rows of all A_i,  U: orthonormal columns that span those of all B_i,
    M_i = Uᵀ B_i A_i Vᵀ,   so that   U M_i V = B_i A_i

Directions that no adapter has are left out, so ranks may differ. Shapes: A [r, n], B [m, r], float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .gauge import Pair

RTOL = 1e-9
"""Singular values of the stacked factors below this part of the largest count as zero."""


@dataclass(frozen=True)
class CoreSpace:
    """The bases and the coordinates.

    Attributes:
        left: U [m, p].
        right: V [q, n].
        cores: M_i [p, q] of each adapter.
    """

    left: torch.Tensor
    right: torch.Tensor
    cores: list[torch.Tensor]

    def factors(self, core: torch.Tensor, rank: int | None = None) -> Pair:
        """U M V as factors with singular values split evenly, at most ``rank`` of them: the nearest of that rank."""
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        kept = len(s) if rank is None else min(rank, len(s))
        root = s[:kept].sqrt()
        return (root[:, None] * vt[:kept]) @ self.right, (self.left @ u[:, :kept]) * root


def core_space(pairs: Sequence[Pair]) -> CoreSpace:
    """The core space of some adapters."""
    right = span(torch.cat([down for down, _ in pairs]).T).T
    left = span(torch.cat([up for _, up in pairs], dim=1))
    return CoreSpace(left, right, [(left.T @ up) @ (down @ right.T) for down, up in pairs])


def span(columns: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of a matrix; none for a matrix of zeros.

    Columns are scaled to one length first, so that a small adapter is not taken for rounding beside a large one.
    """
    sizes = columns.norm(dim=0)
    scaled = columns[:, sizes > 0] / sizes[sizes > 0]
    if not scaled.numel():
        return columns[:, :0]
    basis, triangle = torch.linalg.qr(scaled)
    u, s, _ = torch.linalg.svd(triangle, full_matrices=False)
    found: torch.Tensor = basis @ u[:, s > RTOL * s[0]]
    return found
