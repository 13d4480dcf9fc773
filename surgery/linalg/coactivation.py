"""Neurons that are active on the same tokens: which are, and balanced groups of them.

N counts tokens, P neurons, K groups. A mark says that a neuron is active on a token; A = Mᵀ M counts the tokens on
which two neurons are active together. Its entries are integers below 2^24, so that float32 holds them exactly and no
order of summation changes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .balanced import assign, balanced_kmeans

POWER_STEPS = 40
"""Steps of subspace iteration; the embedding is a start that swaps improve, so eigenvectors need few digits."""


@dataclass(frozen=True)
class Groups:
    """Balanced groups.

    Attributes:
        members_KN: neurons of each group, ascending.
        representative_K: of each group the member whose marks are nearest to the mean of its members' marks in L1.
        objective: after each step: summed L1 distances (`hot_clusters`), or the share of co-activations that lies
            within groups (`coactive_groups`).
    """

    members_KN: NDArray[np.int64]
    representative_K: tuple[int, ...]
    objective: tuple[float, ...]


def marks(values_NP: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest magnitudes of every row: bool [N, P], ties to the lower index."""
    order_NP = torch.argsort(values_NP.abs(), dim=1, descending=True, stable=True)
    found_NP = torch.zeros(values_NP.shape, dtype=torch.bool)
    return found_NP.scatter_(1, order_NP[:, :count], value=True)


def hot_clusters(marks_NP: torch.Tensor, groups: int, *, iterations: int) -> Groups:
    """CMoE's clusters (arXiv:2502.04416) of P / K neurons each.

    Centroids begin as the marks of the K neurons active on most tokens (ties to the lower index). A step is the
    balanced assignment of least summed L1 distance between a neuron's marks and its centroid, solved exactly, and
    then new centroids, the means of the members. It ends when the assignment stays.

    Args:
        marks_NP: bool; groups divides P.
        iterations: most steps, at least 1.
    """
    on_NP = marks_NP.float()
    neurons = on_NP.shape[1]
    rate_P = on_NP.sum(dim=0)
    first = torch.argsort(rate_P, descending=True, stable=True)[:groups]
    centre_NK = on_NP[:, first]
    labels, history = np.full(neurons, -1), list[float]()
    for _ in range(iterations):
        cost_PK = _l1(on_NP, centre_NK).numpy()
        found = assign(cost_PK, neurons // groups)
        if (found == labels).all():
            break
        labels = found
        history.append(float(cost_PK[np.arange(neurons), labels].sum()))
        centre_NK = _means(on_NP, labels, groups)
    return _groups(on_NP, labels, groups, history)


def coactive_groups(
    marks_NP: torch.Tensor, groups: int, rng: np.random.Generator, *, iterations: int
) -> Groups:
    """Groups of P / K neurons with as many co-activations as possible within them: a balanced minimum cut.

    The start is spectral: the leading K eigenvectors of A with its rows and columns divided by the roots of their
    sums, each neuron's row scaled to length one, in clusters of equal size by `balanced_kmeans`. Then, as in
    Kernighan and Lin, of every two groups the two neurons are swapped that gain most, while any swap gains; sweeps
    over all pairs of groups go on until none does. Every swap raises the integer number of co-activations within
    groups, so this ends, and the result is the best under single swaps.

    Args:
        marks_NP: bool; groups divides P.
        rng: for the seeding of k-means and the start of the eigenvectors.
        iterations: most steps of k-means and most sweeps, at least 1.
    """
    from threadpoolctl import threadpool_limits

    on_NP = marks_NP.float()
    count_PP = on_NP.T @ on_NP
    points = _embedding(count_PP, groups, rng)
    # Sums round differently with another number of threads: one, always.
    with threadpool_limits(1):
        start = balanced_kmeans(points, groups, rng, iterations=iterations)
    labels = np.empty(len(points), dtype=np.int64)
    for group, members in enumerate(start.members_KN):
        labels[members] = group
    count_PP.fill_diagonal_(0)
    history = _swap(count_PP.numpy(), labels, groups, iterations)
    return _groups(on_NP, labels, groups, history)


def representatives(marks_NP: torch.Tensor, members_KN: NDArray[np.int64]) -> tuple[int, ...]:
    """Of each group the member whose marks are nearest in L1 to their mean over the group, ties to the lower index."""
    found = []
    for members in members_KN:
        own_Nn = marks_NP[:, torch.from_numpy(members)].float()
        centre_N1 = own_Nn.double().mean(dim=1, keepdim=True)
        found.append(int(members[int(_l1(own_Nn, centre_N1)[:, 0].argmin())]))
    return tuple(found)


def _l1(on_NP: torch.Tensor, centre_NK: torch.Tensor) -> torch.Tensor:
    """Float64 [P, K]: with marks m of 0 and 1 and 0 <= c <= 1, |m - c| sums to sum m + sum c - 2 m c."""
    inner_PK = on_NP.T.double() @ centre_NK.double()
    return on_NP.sum(dim=0).double()[:, None] + centre_NK.double().sum(dim=0) - 2 * inner_PK


def _means(on_NP: torch.Tensor, labels: NDArray[np.int64], groups: int) -> torch.Tensor:
    chosen = [torch.from_numpy(np.flatnonzero(labels == group)) for group in range(groups)]
    return torch.stack([on_NP[:, members].double().mean(dim=1) for members in chosen], dim=1)


def _groups(
    on_NP: torch.Tensor, labels: NDArray[np.int64], groups: int, history: list[float]
) -> Groups:
    members_KN = np.stack([np.flatnonzero(labels == group) for group in range(groups)])
    return Groups(members_KN, representatives(on_NP, members_KN), tuple(history))


def _embedding(
    count_PP: torch.Tensor, groups: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Rows of length one from the leading eigenvectors, or zero for a neuron that is never active: float64 [P, K]."""
    root_P = count_PP.sum(dim=1).double().clamp_min(1).rsqrt()
    scaled_PP = count_PP * root_P[:, None].float() * root_P.float()
    # A few more columns than are kept make the kept ones converge.
    columns = min(len(scaled_PP), groups + 8)
    basis_PC = torch.from_numpy(rng.standard_normal((len(scaled_PP), columns))).float()
    for _ in range(POWER_STEPS):
        basis_PC = torch.linalg.qr(scaled_PP @ basis_PC).Q
    values, vectors = torch.linalg.eigh((basis_PC.T @ scaled_PP @ basis_PC).double())
    leading = values.argsort(descending=True)[:groups]
    rows_PK = basis_PC.double() @ vectors[:, leading]
    # What is never active has zero rows up to rounding.
    alive_P1 = (count_PP.diagonal() > 0)[:, None]
    length_P1 = torch.linalg.vector_norm(rows_PK, dim=1, keepdim=True).clamp_min(1e-12)
    return torch.where(alive_P1, rows_PK / length_P1, 0.0).numpy()


def _swap(
    count_PP: NDArray[np.float32],
    labels: NDArray[np.int64],
    groups: int,
    sweeps: int,
) -> list[float]:
    """Swap in place while a swap gains; the share within groups at the start and after each sweep."""
    total = float(count_PP.sum(dtype=np.float64)) or 1.0
    onto_PK = np.stack(
        [count_PP[:, labels == group].sum(axis=1, dtype=np.float64) for group in range(groups)],
        axis=1,
    )

    def within() -> float:
        return float(onto_PK[np.arange(len(labels)), labels].sum()) / total

    history = [within()]
    for _ in range(sweeps):
        swaps = 0
        for one in range(groups):
            for other in range(one + 1, groups):
                swaps += _swap_pair(count_PP, onto_PK, labels, one, other)
        if not swaps:
            break
        history.append(within())
    return history


def _swap_pair(
    count_PP: NDArray[np.float32],
    onto_PK: NDArray[np.float64],
    labels: NDArray[np.int64],
    one: int,
    other: int,
) -> int:
    """Best swaps between two groups until none gains; how many there were."""
    left, right = np.flatnonzero(labels == one), np.flatnonzero(labels == other)
    between_LR = count_PP[np.ix_(left, right)].astype(np.float64)
    swaps = 0
    while True:
        leave_L = onto_PK[left, other] - onto_PK[left, one]
        come_R = onto_PK[right, one] - onto_PK[right, other]
        gain_LR = leave_L[:, None] + come_R - 2 * between_LR
        place = int(gain_LR.argmax())
        row, column = divmod(place, len(right))
        if gain_LR[row, column] <= 0:
            return swaps
        out, back = left[row], right[column]
        change_P = count_PP[:, back].astype(np.float64) - count_PP[:, out]
        onto_PK[:, one] += change_P
        onto_PK[:, other] -= change_P
        labels[out], labels[back] = other, one
        left[row], right[column] = back, out
        between_LR[row] = count_PP[back, right]
        between_LR[:, column] = count_PP[left, out]
        swaps += 1
