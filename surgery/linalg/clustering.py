"""Clustering of points that are known only through their inner products."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def points_from_gram(gram_EE: Floats) -> Floats:
    """Points in R^E with the given inner products, up to a rotation.

    Args:
        gram_EE: symmetric and positive semi-definite up to rounding; eigenvalues below zero are rounding and
            are dropped.

    Returns:
        [E, E] float64, one point a row. Distances between rows equal those between the original points, so
        clustering them is clustering the originals, whatever their dimension was.
    """
    values, vectors = np.linalg.eigh((gram_EE + gram_EE.T) / 2)
    # The sign of an eigenvector is arbitrary; fix it so that seeds give the same points everywhere.
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(len(values))])
    found: Floats = vectors * np.where(signs == 0, 1.0, signs) * np.sqrt(np.clip(values, 0.0, None))
    return found


def kmeans(points_ED: Floats, clusters: int, *, seed: int, restarts: int = 10) -> list[int]:
    """K-means with k-means++ seeding; labels of exactly ``clusters`` non-empty clusters.

    Duplicated points are allowed: where there are fewer distinct points than clusters, clusters left empty
    take the point farthest from its own centre, ties to the lowest index. Labels are renumbered by first
    occurrence, so they do not depend on the order in which centres were found.

    Args:
        points_ED: [E, D] float64.
        clusters: 1 to E.
        seed: for the seeding.
        restarts: independent starts, of which the best is kept.
    """
    count = len(points_ED)
    distinct = len(np.unique(points_ED.round(12), axis=0))
    if clusters >= count:
        return list(range(count))
    from sklearn.cluster import KMeans

    fitted = KMeans(
        min(clusters, distinct), init="k-means++", n_init=restarts, random_state=seed
    ).fit(points_ED)
    labels = [int(label) for label in fitted.labels_]
    _fill_empty(points_ED, labels, clusters)
    order: dict[int, int] = {}
    return [order.setdefault(label, len(order)) for label in labels]


def inertia(points_ED: Floats, labels: list[int]) -> float:
    """Sum of squared distances to the clusters' means."""
    total = 0.0
    for label in set(labels):
        members = points_ED[[index for index, found in enumerate(labels) if found == label]]
        total += float(np.square(members - members.mean(axis=0)).sum())
    return total


def _fill_empty(points_ED: Floats, labels: list[int], clusters: int) -> None:
    for empty in range(clusters):
        if empty in labels:
            continue
        best, farthest = -1, -1.0
        for index, label in enumerate(labels):
            members = [other for other, found in enumerate(labels) if found == label]
            if len(members) < 2:
                continue
            distance = float(np.square(points_ED[index] - points_ED[members].mean(axis=0)).sum())
            if distance > farthest:
                best, farthest = index, distance
        labels[best] = empty
