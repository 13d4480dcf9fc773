"""Matrices of several experts written with parts that they share.

E counts experts, O and I an expert matrix's rows and columns, R is the rank. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError, UsageError
from .lowrank import LowRank, check_rank, truncate
from .svd import leading_left
from .whitening import truncate_whitened


@dataclass(frozen=True)
class Grouped:
    """W_e = private_e shared_g (``side`` is ``input``) or shared_g private_e (``output``).

    Attributes:
        shared: one a group: [R, I] or [O, R].
        private: one an expert: [O, R] or [R, I].
    """

    side: str
    shared: list[torch.Tensor]
    private: list[torch.Tensor]

    def weight(self, expert: int) -> torch.Tensor:
        """The matrix [O, I] that an expert is left with."""
        shared = self.shared[expert * len(self.shared) // len(self.private)]
        if self.side == "input":
            return self.private[expert] @ shared
        return shared @ self.private[expert]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"private": torch.stack(self.private), "shared": torch.stack(self.shared)}


@dataclass(frozen=True)
class Shifted:
    """W_e = base + left_e right_e."""

    base_OI: torch.Tensor
    deltas: list[LowRank]

    def weight(self, expert: int) -> torch.Tensor:
        """The matrix [O, I] that an expert is left with."""
        return self.base_OI + self.deltas[expert].product()

    def tensors(self) -> dict[str, torch.Tensor]:
        pairs = [delta.balanced() for delta in self.deltas]
        return {
            "base": self.base_OI,
            "left": torch.stack([left for left, _ in pairs]),
            "right": torch.stack([right for _, right in pairs]),
        }


def share_input(
    matrices: Sequence[torch.Tensor],
    rank: int,
    groups: int,
    gram_II: torch.Tensor | None = None,
    *,
    damping: float = 0.0,
) -> Grouped:
    """One projection of the input for each group of consecutive experts.

    The matrices of a group, stacked to [K O, I], are truncated to rank R, which is optimal for the sum of their
    squared errors (Eckart and Young); with a Gram matrix of the inputs, for the errors of their outputs.
    """
    shared: list[torch.Tensor] = []
    private: list[torch.Tensor] = []
    for group in _split(matrices, groups):
        stacked = torch.cat(list(group))
        if gram_II is None:
            found = truncate(stacked, rank)
        else:
            found = truncate_whitened(stacked, gram_II, rank, damping=damping)
        left, right = found.balanced()
        shared.append(right)
        private.extend(left.reshape(len(group), -1, rank).unbind())
    return Grouped("input", shared, private)


def share_output(
    matrices: Sequence[torch.Tensor],
    rank: int,
    groups: int,
    grams: Sequence[torch.Tensor | None] | None = None,
    *,
    damping: float = 0.0,
) -> Grouped:
    """One way to write the output for each group of consecutive experts.

    The shared factor holds the leading eigenvectors of sum_e W_e C_e W_e^T, each expert's own that basis's
    coordinates of its matrix, which is optimal whatever the inputs' Gram matrices C_e (the identity where there is
    none).
    """
    shared: list[torch.Tensor] = []
    private: list[torch.Tensor] = []
    given = grams or [None] * len(matrices)
    start = 0
    for group in _split(matrices, groups):
        outputs = group[0].shape[0]
        total = torch.zeros(outputs, outputs, dtype=torch.float64)
        for offset, matrix in enumerate(group):
            wide = matrix.double()
            seen = wide
            gram = given[start + offset]
            if gram is not None:
                seen = wide @ damped(gram, damping)
            total += seen @ wide.T
        if not bool(torch.isfinite(total).all()):
            raise InputError("a matrix to factorise, or its Gram matrix, is not finite")
        if not 1 <= rank <= outputs:
            raise UsageError(f"rank {rank} is not one of outputs of {outputs}")
        basis = leading_left(total, rank)
        inner = [basis.T @ matrix.double() for matrix in group]
        # One scale for the basis, so that both factors round alike in half precision.
        size = (sum(float(part.square().sum()) for part in inner) / (len(inner) * rank)) ** 0.25
        shared.append(basis * (size or 1.0))
        private.extend(part / (size or 1.0) for part in inner)
        start += len(group)
    return Grouped("output", shared, private)


def share_base(
    matrices: Sequence[torch.Tensor],
    base_OI: torch.Tensor,
    rank: int,
    grams: Sequence[torch.Tensor | None] | None = None,
    *,
    damping: float = 0.0,
) -> Shifted:
    """One matrix for all experts and a low-rank difference from it for each.

    Args:
        grams: of each expert's inputs; None, or zero, for the plain truncation.
    """
    deltas = []
    for expert, matrix in enumerate(matrices):
        check_rank(matrix, rank)
        difference = matrix.double() - base_OI
        gram = None if grams is None else grams[expert]
        if gram is None or not bool(gram.any()):
            deltas.append(truncate(difference, rank))
        else:
            deltas.append(truncate_whitened(difference, gram, rank, damping=damping))
    return Shifted(base_OI, deltas)


def damped(gram_II: torch.Tensor, damping: float) -> torch.Tensor:
    """A Gram matrix with a multiple of its mean diagonal added, float64."""
    wide = gram_II.double()
    size = damping * wide.diagonal().mean()
    return wide + size * torch.eye(len(wide), dtype=torch.float64)


def _split(matrices: Sequence[torch.Tensor], groups: int) -> list[Sequence[torch.Tensor]]:
    count = len(matrices)
    if groups < 1 or count % groups:
        raise UsageError(f"{count} experts cannot form {groups} groups of one size")
    size = count // groups
    return [matrices[start : start + size] for start in range(0, count, size)]
