"""K-means with clusters of exactly one size, each assignment step solved to optimality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Balanced:
    """The clustering found.

    Attributes:
        members_KN: indices of each cluster's points, ascending, one row a cluster.
        centres_KD: their means, float64.
        inertia: sum of squared distances to the centres after each step; it never rises.
    """

    members_KN: NDArray[np.int64]
    centres_KD: Floats
    inertia: tuple[float, ...]


def balanced_kmeans(
    points_PD: Floats, clusters: int, rng: np.random.Generator, *, iterations: int
) -> Balanced:
    """Clusters of P / K points each.

    k-means++ seeding, then in turn the assignment of least total cost and new means, until the assignment stays
    or ``iterations`` are done. The assignment is a linear one with every centre standing for P / K places
    (a P x P cost), so it is the best for its centres, not a greedy one.

    Args:
        points_PD: [P, D]; computed in float64.
        clusters: K, a divisor of P.
        rng: for the seeding.
        iterations: at least 1.
    """
    points_PD = points_PD.astype(np.float64)
    places = len(points_PD) // clusters
    centres_KD = points_PD[_seeds(points_PD, clusters, rng)]
    labels, history = np.full(len(points_PD), -1), list[float]()
    for _ in range(iterations):
        found = assign(_distances(points_PD, centres_KD), places)
        if (found == labels).all():
            break
        labels = found
        centres_KD = np.stack([points_PD[labels == k].mean(axis=0) for k in range(clusters)])
        history.append(float(np.square(points_PD - centres_KD[labels]).sum()))
    members_KN = np.stack([np.flatnonzero(labels == k) for k in range(clusters)])
    return Balanced(members_KN, centres_KD, tuple(history))


def assign(cost_PK: Floats, places: int) -> NDArray[np.int64]:
    """The cluster of each point, ``places`` points a cluster, of least total cost."""
    from scipy.optimize import linear_sum_assignment

    points, columns = linear_sum_assignment(np.repeat(cost_PK, places, axis=1))
    labels = np.empty(len(cost_PK), dtype=np.int64)
    labels[points] = columns // places
    return labels


def _distances(points_PD: Floats, centres_KD: Floats) -> Floats:
    squares: Floats = (
        np.square(points_PD).sum(axis=1)[:, None]
        - 2 * points_PD @ centres_KD.T
        + np.square(centres_KD).sum(axis=1)
    )
    return squares


def _seeds(points_PD: Floats, clusters: int, rng: np.random.Generator) -> list[int]:
    """k-means++: each further seed is drawn in proportion to the squared distance from those there are."""
    chosen = [int(rng.integers(len(points_PD)))]
    nearest = np.full(len(points_PD), np.inf)
    while len(chosen) < clusters:
        offset = np.square(points_PD - points_PD[chosen[-1]]).sum(axis=1)
        nearest = np.minimum(nearest, offset)
        total = nearest.sum()
        if total > 0:
            chosen.append(int(rng.choice(len(points_PD), p=nearest / total)))
        else:  # fewer distinct points than clusters
            chosen.append(min(set(range(len(points_PD))) - set(chosen)))
    return chosen
