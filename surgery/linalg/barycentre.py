"""The mean of several feed-forwards after their neurons were put in the best common order.

E counts experts, F their neurons, N the numbers of a neuron (its rows of gate and up and its column of down).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROUNDS = 100
"""Alternations at most; the objective falls with each, so that few are needed."""


@dataclass(frozen=True)
class Barycentre:
    """What was found.

    Attributes:
        orders: for each expert, which of its neurons goes to which slot, int64 [F].
        centre_FN: the mean of the ordered experts.
        losses: mean squared distance of the ordered experts from the centre, after every round; never rising.
    """

    orders: list[torch.Tensor]
    centre_FN: torch.Tensor
    losses: list[float]


def barycentre(experts: Sequence[torch.Tensor], rounds: int = ROUNDS) -> Barycentre:
    """Alternate between the best order of every expert and the mean of the ordered experts.

    For equal and uniform weights a free-support Wasserstein barycentre with F points is this: optimal transport
    between two sets of F points of equal weight has a permutation among its solutions. Begins with the first expert.

    Args:
        experts: [F, N] each, float32 or float64.
    """
    from scipy.optimize import linear_sum_assignment

    centre_FN = experts[0].double()
    orders = [torch.arange(len(centre_FN))] * len(experts)
    losses: list[float] = []
    for _ in range(max(1, rounds)):
        previous = orders
        orders = []
        for expert_FN in experts:
            # Norms of rows do not depend on the order, so that inner products decide.
            score_FF = centre_FN @ expert_FN.double().T
            orders.append(
                torch.from_numpy(linear_sum_assignment(score_FF, maximize=True)[1]).long()
            )
        total_FN = torch.zeros_like(centre_FN)
        for expert_FN, order in zip(experts, orders, strict=True):
            total_FN += expert_FN[order]
        centre_FN = total_FN / len(experts)
        losses.append(
            sum(
                float((expert_FN[order] - centre_FN).square().sum())
                for expert_FN, order in zip(experts, orders, strict=True)
            )
            / len(experts)
        )
        if all(torch.equal(one, other) for one, other in zip(orders, previous, strict=True)):
            break
    return Barycentre(orders, centre_FN, losses)
