"""Neuron assignment by normalised distances of weights, activations or both: the matching of REAM."""

from __future__ import annotations

import torch

from .permutation import Alignment

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def align_normalised(
    reference: Triple,
    target: Triple,
    *,
    weights: bool,
    activations: tuple[torch.Tensor, torch.Tensor] | None,
) -> Alignment:
    """The permutation of ``target``'s neurons that minimises the summed distance to ``reference``'s.

    The distance of two neurons is |w_r/|w_r| - w_t/|w_t|| of their weights w = [G row, U row, D column], plus the
    same of their activations on a set of tokens, whichever are asked for. (REAM, arXiv:2604.04356. Its code takes the
    first 64 principal components of the normalised weights; here the distance is that of the weights themselves.)

    Args:
        reference, target: gate [F, D], up [F, D] and down [D, F], float32.
        weights: whether weights count.
        activations: of reference and target [N, F] each, on the same tokens in the same order; None leaves
            them out.

    Returns:
        ``before`` and ``after`` are mean distances of corresponding neurons.
    """
    from scipy.optimize import linear_sum_assignment

    width = reference[0].shape[0]
    cost_FF = torch.zeros(width, width, dtype=torch.float64)
    if weights:
        cost_FF += _distances(_features(reference), _features(target))
    if activations is not None:
        cost_FF += _distances(activations[0].T, activations[1].T)
    _, columns = linear_sum_assignment(cost_FF.numpy())
    order_F = torch.from_numpy(columns).long()
    return Alignment(
        order_F,
        before=float(cost_FF.diagonal().mean()),
        after=float(cost_FF.gather(1, order_F[:, None]).mean()),
    )


def _features(expert: Triple) -> torch.Tensor:
    gate_FD, up_FD, down_DF = expert
    return torch.cat([gate_FD, up_FD, down_DF.T], dim=1)


def _distances(first_FN: torch.Tensor, second_FN: torch.Tensor) -> torch.Tensor:
    """Distances between rows of unit length, [F, F]; a row of zeros stays zero."""
    cosine_FF = _unit(first_FN) @ _unit(second_FN).T
    squares_FF = _unit(first_FN).square().sum(1)[:, None] + _unit(second_FN).square().sum(1)
    distance_FF: torch.Tensor = (squares_FF - 2 * cosine_FF).clamp_min(0.0).sqrt()
    return distance_FF


def _unit(rows_FN: torch.Tensor) -> torch.Tensor:
    wide_FN = rows_FN.double()
    norm_F1: torch.Tensor = torch.linalg.vector_norm(wide_FN, dim=1, keepdim=True)
    return wide_FN / norm_F1.clamp_min(1e-300)
