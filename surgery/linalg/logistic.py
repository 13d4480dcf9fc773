"""Multinomial logistic regression without intercept, as a router is a linear layer without bias. Float64 throughout.

For N rows x with labels y of C classes, and z = x divided by the root mean square of every feature (the mean over
classes of the mean over their rows),

    min over V [C, D] of  (1 / C) sum_c mean_{n: y_n = c} -log softmax(V z_n)_c  +  (l2 / 2) |V|^2

so every class weighs the same, however many rows it has. The rows that belong to x itself are V divided by those root
mean squares. Gradients of the loss sum to zero over classes, so the rows of V do: equal logits are the fit's centre.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

STEPS = 500
"""Most steps of L-BFGS; the gradient is below 1e-6 long before on inputs of a model."""


def fit(x_ND: torch.Tensor, label_N: torch.Tensor, classes: int, *, l2: float) -> torch.Tensor:
    """The rows W [C, D] with logits W x, float64.

    Args:
        x_ND: inputs of any floating type.
        label_N: int64, every class below ``classes`` at least once.
        classes: C.
        l2: strength of the penalty, above 0, which makes the minimum unique and finite.

    Raises:
        ValueError: a class without a row, or a penalty that is not above 0.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    count_C = torch.bincount(label_N, minlength=classes)
    if len(count_C) != classes or not bool((count_C > 0).all()) or not l2 > 0:
        raise ValueError("expected rows of every class and l2 above 0")
    weight_N = (1 / (classes * count_C.double()))[label_N]
    z_ND = x_ND.to(torch.float64, copy=True)
    rms_D = (weight_N @ z_ND.square()).sqrt()
    rms_D = torch.where(rms_D > 0, rms_D, torch.ones_like(rms_D))
    z_ND /= rms_D
    place_N = torch.arange(len(label_N))

    def loss(flat: Any) -> tuple[float, Any]:
        rows_CD = torch.from_numpy(flat).reshape(classes, -1)
        log_NC = torch.log_softmax(z_ND @ rows_CD.T, dim=-1)
        value = -(weight_N * log_NC[place_N, label_N]).sum() + l2 / 2 * rows_CD.square().sum()
        error_NC = log_NC.exp()
        error_NC[place_N, label_N] -= 1
        gradient_CD = (weight_N[:, None] * error_NC).T @ z_ND + l2 * rows_CD
        return float(value), gradient_CD.reshape(-1).numpy()

    # Sums round differently with another number of threads: one, always.
    with threadpool_limits(1):
        found = minimize(
            loss,
            np.zeros(classes * z_ND.shape[1]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": STEPS, "maxfun": 2 * STEPS, "ftol": 1e-12, "gtol": 1e-7},
        )
    rows_CD: torch.Tensor = torch.from_numpy(found.x).reshape(classes, -1) / rms_D
    return rows_CD


def held_out(sequence_N: torch.Tensor) -> torch.Tensor:
    """Which rows of a class to leave out of a fit that is to be judged by them: bool [N].

    Every fifth sequence, because tokens of one sequence know of each other; where that is none or all of them, the last
    fifth of the rows.

    Args:
        sequence_N: the sequence of each row, ascending from 0.
    """
    out_N = sequence_N % 5 == 2
    if bool(out_N.any()) and not bool(out_N.all()):
        return out_N
    return torch.arange(len(sequence_N)) >= len(sequence_N) - len(sequence_N) // 5


def accuracy(x_ND: torch.Tensor, label_N: torch.Tensor, rows_CD: torch.Tensor) -> float:
    """The mean over classes of the share of rows whose largest logit is their class's; 0 without rows."""
    if not len(label_N):
        return 0.0
    right_N = ((x_ND.double() @ rows_CD.T).argmax(dim=-1) == label_N).double()
    count_C = torch.bincount(label_N, minlength=len(rows_CD)).double()
    share_C = torch.bincount(label_N, right_N, minlength=len(rows_CD)) / count_C.clamp_min(1)
    return float(share_C[count_C > 0].mean())
