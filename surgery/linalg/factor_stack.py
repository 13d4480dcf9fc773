"""Several adapters' factors of one module side by side, and what a merge tells about them.

Everything comes from two Gram matrices of the stacked factors, which are as large as the sum of the ranks, instead of
from decompositions of each part; where ranks cancel so far that Gram matrices lose digits, decompositions take over.
Shapes as in `factors`: A_i [E, r_i, n], B_i [E, m, r_i], float64, R the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate, pairwise

import torch

from . import factors as products
from .factors import Factors

NEGLIGIBLE = 1e-14
"""Squared singular values below this part of the largest are rounding of the Gram matrices."""
SAFE = (1e-8, 1e8)
"""Norms of factors whose rounding has squares that float32 holds."""


class Stack:
    """The factors of some adapters with a weight each.

    Args:
        several: at least one.
        weights: of their products.
    """

    def __init__(self, several: Sequence[Factors], weights: Sequence[float]) -> None:
        self._several, self._weights = several, weights
        self._ranks = tuple(down.shape[1] for down, _ in several)
        self._plain = all(weight == 1 for weight in weights)

    @cached_property
    def total(self) -> Factors:
        """A [E, R, n] and B [E, m, R] whose product is the weighted sum of the products; weights are in B."""
        down = torch.cat([down_ERN for down_ERN, _ in self._several], dim=1)
        up = torch.cat([up_EMR for _, up_EMR in self._several], dim=2)
        return down, up if self._plain else up * self._scales

    @cached_property
    def _scales(self) -> torch.Tensor:
        """The weight of every rank, [R]."""
        weights = torch.tensor(self._weights, dtype=torch.float64)
        return weights.repeat_interleave(torch.tensor(self._ranks))

    @cached_property
    def _gram_down(self) -> torch.Tensor:
        """A A^T, [E, R, R]."""
        down, _ = self.total
        return down @ down.mT

    @cached_property
    def _gram_up(self) -> torch.Tensor:
        """B^T B with the weights, [E, R, R]."""
        _, up = self.total
        return up.mT @ up

    @cached_property
    def _inner(self) -> torch.Tensor:
        """Inner products of the products with their weights, all E together: [T, T]."""
        members = _members(self._ranks)
        return members @ (self._gram_down * self._gram_up).sum(dim=0) @ members.T

    @cached_property
    def _sizes(self) -> torch.Tensor:
        """Norm of every rank's product with its weight, [E, R]."""
        return _sizes(self._gram_down, self._gram_up)

    @cached_property
    def norm(self) -> float:
        """Of the weighted sum, all E together."""
        square = float(self._inner.sum())
        if self._cancels(square):
            return float(torch.linalg.vector_norm(products.core(self.total)))
        return math.sqrt(square)

    def _cancels(self, square: float) -> bool:
        """Whether a squared norm of the sum is so much smaller than the ranks' own that its digits are gone."""
        return not square > products.CANCELLED * float(self._sizes.sum(dim=-1).square().sum())

    def cosines(self) -> list[list[float]]:
        """Cosines of the angles between the products of one and of another, all E together; 0 where one is zero."""
        if not all(self._weights):
            # What is left out of the sum has its angles all the same.
            return Stack(self._several, [1.0] * len(self._several)).cosines()
        signs = [math.copysign(1.0, weight) for weight in self._weights]
        bounds = (self._sizes @ _members(self._ranks).T).square().sum(dim=0).tolist()
        inner = self._inner.tolist()
        sizes = [
            math.sqrt(inner[index][index])
            if inner[index][index] > products.CANCELLED * bounds[index]
            else abs(weight) * float(torch.linalg.vector_norm(products.core(pair)))
            for index, (pair, weight) in enumerate(zip(self._several, self._weights, strict=True))
        ]
        return [
            [
                signs[i] * signs[j] * inner[i][j] / (mine * other) if mine * other else 0.0
                for j, other in enumerate(sizes)
            ]
            for i, mine in enumerate(sizes)
        ]

    def dead(self) -> int:
        """How many ranks contribute nothing to the product that they belong to: see `factors.dead`."""
        if not all(self._weights):
            return sum(products.dead(pair) for pair in self._several)
        count = 0
        for row in self._sizes.tolist():
            for begin, end in pairwise(accumulate(self._ranks, initial=0)):
                sizes = row[begin:end]
                least = products.DEAD * max(sizes)
                count += sum(size <= least for size in sizes)
        return count

    def effective_rank(self) -> float:
        """Of the weighted sum: see `factors.effective_rank`; singular values below 1e-7 of the largest are zeros.

        With A A^T = L L^T the squared singular values are the eigenvalues of L^T (B^T B) L.
        """
        down, up = self.total
        if down.shape[1] > min(down.shape[2], up.shape[1]):
            return products.effective_rank(down, up)
        lower, failed = torch.linalg.cholesky_ex(self._gram_down)
        squares = torch.linalg.eigvalsh(lower.mT @ self._gram_up @ lower)
        if bool(failed.any()) or self._cancels(float(squares.sum())):
            return products.effective_rank(down, up)
        largest = squares.amax(dim=-1, keepdim=True)
        values = torch.where(squares > NEGLIGIBLE * largest, squares, 0.0).sqrt()
        return products.entropy_rank(values)

    def rounding_error(self, rounded: Factors) -> float:
        """Relative distance of the sum from what its factors became by a cast: see `factors.rounding_error`.

        With C and D what the cast took from A and B, the difference is D A + B C - D C, and its squared norm is

            <D'D, A A' + C C' - 2 A C'> + <C C', B'B - 2 B'D> + 2 <(B'D)', A C'>

        The Gram matrices of A and B are known; those of C and D are taken in float32, to six digits.

        Args:
            rounded: A and B in the stored type, [E, R, n] and [E, m, R].
        """
        down, up = self.total
        peak_down, peak_up = (
            math.sqrt(float(gram.diagonal(dim1=1, dim2=2).amax()))
            for gram in (self._gram_down, self._gram_up)
        )
        if all(SAFE[0] < peak < SAFE[1] for peak in (peak_down, peak_up)):
            lost_down, lost_up = ((a - b).float() for a, b in zip((down, up), rounded, strict=True))
            near_down, near_up = (
                kept if kept.dtype == torch.float32 else whole.float()
                for kept, whole in zip(rounded, (down, up), strict=True)
            )
            gram_c, gram_d = lost_down @ lost_down.mT, lost_up.mT @ lost_up
            cross_a, cross_b = near_down @ lost_down.mT, near_up.mT @ lost_up
            terms = (
                gram_d.double() * (self._gram_down + gram_c - 2 * cross_a)
                + gram_c.double() * (self._gram_up - 2 * cross_b)
                + 2 * cross_b.mT.double() * cross_a
            )
            square = float(terms.sum())
            sizes = _sizes(gram_d, self._gram_down) + _sizes(gram_c, self._gram_up)
            bound = float(sizes.sum(dim=-1).square().sum())
            if not bound or not self.norm:
                return 0.0
            if square > 1e-2 * bound / (2 * sum(self._ranks)):
                return math.sqrt(square) / self.norm
        wide = rounded[0].double(), rounded[1].double()
        return products.rounding_error((down, up), wide, self.norm)


def _sizes(gram: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Norm of every rank's product from two Gram matrices of its factors, [E, R]."""
    return (gram.diagonal(dim1=1, dim2=2) * other.diagonal(dim1=1, dim2=2)).sqrt()


@cache
def _members(ranks: tuple[int, ...]) -> torch.Tensor:
    """Which ranks belong to which product: ones in [T, R]."""
    return torch.eye(len(ranks), dtype=torch.float64).repeat_interleave(torch.tensor(ranks), dim=1)
