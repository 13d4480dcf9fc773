"""A linear router fitted to wanted choices: logistic regression without a bias, as stock routers are.

N counts tokens, E experts, D the model width.
"""

from __future__ import annotations

from typing import Any

import torch

STEPS = 200
"""Most steps of L-BFGS; the problem is convex, and a regularised one converges in fewer."""


def fit_router(
    inputs_ND: torch.Tensor, scores_NE: torch.Tensor, top_k: int, *, ridge: float
) -> torch.Tensor:
    """Rows W that minimise a logistic loss of every wanted expert against all that are not, and a ridge.

    Wanted are the ``top_k`` experts S of largest score. With z = W x the loss is

        mean over tokens and i in S of  -log( e^z_i / (e^z_i + sum_{j not in S} e^z_j) )

    which is convex, is multinomial regression for k = 1, and vanishes on wide margins. (Even shares of a softmax over
    all would not: they ask wanted experts to have equal logits.) Inputs are divided by their root mean square s
    first, so that a ridge means the same on every model; the penalty is ridge / 2 |s W|^2 summed over entries.

    Args:
        inputs_ND: floating.
        scores_NE: floating; only their order counts.
        ridge: above 0, which makes the minimum unique.

    Returns:
        float64 [E, D], each column's mean over experts zero; all zero where every expert is wanted.
    """
    import numpy as np
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    x_ND = inputs_ND.double()
    scale = float(x_ND.square().mean().sqrt()) or 1.0
    x_ND = x_ND / scale
    wanted_NE = chosen(scores_NE, top_k)
    shape = (scores_NE.shape[1], x_ND.shape[1])
    if top_k >= shape[0]:
        return torch.zeros(shape, dtype=torch.float64)
    shares = 1 / (len(x_ND) * top_k)

    def value(flat: Any) -> tuple[float, Any]:
        w_ED = torch.from_numpy(flat).view(shape)
        logits_NE = x_ND @ w_ED.T
        others_NE = logits_NE.masked_fill(wanted_NE, float("-inf"))
        margin_NE = logits_NE - others_NE.logsumexp(dim=1, keepdim=True)
        losses_NE = -torch.nn.functional.logsigmoid(margin_NE).masked_fill(~wanted_NE, 0.0)
        push_NE = torch.sigmoid(-margin_NE).masked_fill(~wanted_NE, 0.0)
        slope_NE = push_NE.sum(dim=1, keepdim=True) * others_NE.softmax(dim=1) - push_NE
        loss = float(losses_NE.sum()) * shares + ridge / 2 * float(w_ED.square().sum())
        slope_ED = slope_NE.T @ x_ND * shares + ridge * w_ED
        return loss, slope_ED.reshape(-1).numpy()

    # Sums round differently with another number of threads: one, always.
    with threadpool_limits(1):
        found = minimize(
            value,
            np.zeros(shape[0] * shape[1]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": STEPS, "gtol": 1e-6},
        )
    rows_ED = torch.from_numpy(np.asarray(found.x)).view(shape) / scale
    return rows_ED - rows_ED.mean(dim=0)


def chosen(scores_NE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The experts of the ``top_k`` largest scores of every token: bool [N, E], ties to the lower index."""
    order_NE = torch.argsort(scores_NE, dim=1, descending=True, stable=True)
    found_NE = torch.zeros(scores_NE.shape, dtype=torch.bool)
    return found_NE.scatter_(1, order_NE[:, :top_k], value=True)


def recall(scores_NE: torch.Tensor, reference_NE: torch.Tensor, top_k: int) -> float:
    """Recall@k: which share of the reference's ``top_k`` experts is among the scores', mean over tokens."""
    both_NE = chosen(scores_NE, top_k) & chosen(reference_NE, top_k)
    return float(both_NE.sum()) / (len(scores_NE) * top_k)
