"""Several adapters' factors of one module side by side, and what a merge tells about them.

Everything comes from two Gram matrices of the stacked factors, which are as large as the sum of the ranks, instead of
from decompositions of each part; where ranks cancel so far that Gram matrices lose digits, decompositions take over.
Shapes as in `factors`: A_i [E, r_i, n], B_i [E, m, r_i], float64, R the sum of the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from . import factors as products
from .factors import Factors

NEGLIGIBLE = 1e-14
"""Squared singular values below this part of the largest are rounding of the Gram matrices."""


class Stack:
    """The factors of some adapters with a weight each.

    Args:
        several: at least one.
        weights: of their products.
    """

    def __init__(self, several: Sequence[Factors], weights: Sequence[float]) -> None:
        self._several, self._weights = several, weights
        ranks = [down.shape[1] for down, _ in several]
        self._spans = [slice(*ends) for ends in pairwise(accumulate(ranks, initial=0))]
        self._scales = torch.tensor(weights, dtype=torch.float64).repeat_interleave(
            torch.tensor(ranks)
        )
        self._plain = all(weight == 1 for weight in weights)

    @cached_property
    def total(self) -> Factors:
        """A [E, R, n] and B [E, m, R] whose product is the weighted sum of the products; weights are in B."""
        return self._down, self._up if self._plain else self._up * self._scales

    @cached_property
    def _down(self) -> torch.Tensor:
        return torch.cat([down_ERN for down_ERN, _ in self._several], dim=1)

    @cached_property
    def _up(self) -> torch.Tensor:
        return torch.cat([up_EMR for _, up_EMR in self._several], dim=2)

    @cached_property
    def _gram_down(self) -> torch.Tensor:
        """A A^T, [E, R, R]."""
        return self._down @ self._down.mT

    @cached_property
    def _gram_up(self) -> torch.Tensor:
        """B^T B without the weights, [E, R, R]."""
        return self._up.mT @ self._up

    @cached_property
    def _gram_weighted(self) -> torch.Tensor:
        """The same with the weights."""
        return (
            self._gram_up
            if self._plain
            else self._gram_up * torch.outer(self._scales, self._scales)
        )

    @property
    def norm(self) -> float:
        """Of the weighted sum, all E together."""
        return _norm(self._gram_down, self._gram_weighted, self.total)

    def cosines(self) -> list[list[float]]:
        """Cosines of the angles between the products of one and of another, all E together; 0 where one is zero."""
        shared = (self._gram_down * self._gram_up).sum(dim=0)
        sizes = [
            _norm(self._gram_down[:, span, span], self._gram_up[:, span, span], pair)
            for span, pair in zip(self._spans, self._several, strict=True)
        ]
        return [
            [
                float(shared[row, column].sum()) / (mine * other) if mine * other else 0.0
                for column, other in zip(self._spans, sizes, strict=True)
            ]
            for row, mine in zip(self._spans, sizes, strict=True)
        ]

    def effective_rank(self) -> float:
        """Of the weighted sum: see `factors.effective_rank`; singular values below 1e-7 of the largest are zeros.

        With A A^T = L L^T the squared singular values are the eigenvalues of L^T (B^T B) L.
        """
        down, up = self.total
        if down.shape[1] > min(down.shape[2], up.shape[1]):
            return products.effective_rank(down, up)
        lower, failed = torch.linalg.cholesky_ex(self._gram_down)
        squares = torch.linalg.eigvalsh(lower.mT @ self._gram_weighted @ lower)
        if bool(failed.any()) or _cancels(squares, self._gram_down, self._gram_weighted):
            return products.effective_rank(down, up)
        largest = squares.amax(dim=-1, keepdim=True)
        values = torch.where(squares > NEGLIGIBLE * largest, squares, 0.0).sqrt()
        return products.entropy_rank(values)


def _norm(gram_down: torch.Tensor, gram_up: torch.Tensor, pair: Factors) -> float:
    """Of products from their Gram matrices, or from themselves where those have lost digits."""
    squares = gram_down * gram_up
    if _cancels(squares, gram_down, gram_up):
        return float(torch.linalg.vector_norm(products.core(pair)))
    return math.sqrt(float(squares.sum()))


def _cancels(squares: torch.Tensor, gram_down: torch.Tensor, gram_up: torch.Tensor) -> bool:
    """Whether what adds up to a squared norm is so much smaller than the ranks' own norms that its digits are gone."""
    sizes = (gram_down.diagonal(dim1=1, dim2=2) * gram_up.diagonal(dim1=1, dim2=2)).sqrt()
    return not float(squares.sum()) > products.CANCELLED * float(sizes.sum(dim=-1).square().sum())
