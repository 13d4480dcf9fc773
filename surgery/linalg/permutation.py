"""Neuron permutations of a SwiGLU feed-forward, and the best one between two of them.

Reordering the hidden neurons of an expert leaves its function unchanged, so two experts may hold the same
function with their neurons shuffled; averaging them as they lie would average unrelated neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Alignment:
    """The assignment found.

    Attributes:
        order_F: ``order_F[r]`` is the target's neuron that goes to slot ``r``, int64.
        before: mean squared distance of corresponding neurons before, relative to the reference's mean square.
        after: the same after the permutation; never larger.
    """

    order_F: torch.Tensor
    before: float
    after: float


def align(
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    target: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> Alignment:
    """The neuron permutation of ``target`` that brings it closest to ``reference``.

    Maximises sum_r <G_R[r], G_E[p(r)]> + <U_R[r], U_E[p(r)]> + <D_R[:, r], D_E[:, p(r)]>, which is the same
    as minimising the squared distance of all three matrices, because row norms do not depend on p. An expert
    has one hidden layer, so a single linear assignment is exact. (Weight matching of M-SMoE,
    arXiv:2310.01334 section 3.1, with the SwiGLU cost.)

    Args:
        reference, target: gate [F, D], up [F, D] and down [D, F], float32.
    """
    from scipy.optimize import linear_sum_assignment

    gate_R, up_R, down_R = reference
    gate_E, up_E, down_E = target
    score_FF = gate_R @ gate_E.T
    score_FF += up_R @ up_E.T
    score_FF += down_R.T @ down_E
    _, columns = linear_sum_assignment(score_FF.numpy(), maximize=True)
    order_F = torch.from_numpy(columns).long()
    squares_R = _squares(reference)
    total = float(squares_R.sum() + _squares(target).sum())
    scale = max(float(squares_R.sum()), torch.finfo(torch.float32).tiny)
    kept = float(score_FF.diagonal().sum(dtype=torch.float64))
    matched = float(score_FF.gather(1, order_F[:, None]).sum(dtype=torch.float64))
    return Alignment(
        order_F,
        before=max(0.0, total - 2 * kept) / scale,
        after=max(0.0, total - 2 * matched) / scale,
    )


def _squares(
    expert: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    return torch.stack([matrix.double().square().sum() for matrix in expert])
