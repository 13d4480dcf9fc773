"""Hierarchical clustering into an exact number of clusters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LINKAGES = ("average", "complete", "single", "ward")


def agglomerate(points_ED: NDArray[np.float64], clusters: int, linkage: str) -> list[int]:
    """Merge the two nearest clusters until ``clusters`` are left, with SciPy's linkage on Euclidean distances.

    The first E - clusters merges of the tree are taken, so that the number is exact also among equal distances (a
    cut at a height is not).

    Args:
        points_ED: one point a row.
        clusters: 1 to E.
        linkage: one of LINKAGES; each merges the nearest clusters, they differ in what near means.

    Returns:
        Labels, numbered by first occurrence.
    """
    from scipy.cluster.hierarchy import linkage as tree_of

    count = len(points_ED)
    if clusters >= count:
        return list(range(count))
    tree = tree_of(points_ED, method=linkage, metric="euclidean")  # type: ignore[arg-type]
    members = {index: [index] for index in range(count)}
    for step, (first, second, *_) in enumerate(tree[: count - clusters]):
        members[count + step] = members.pop(int(first)) + members.pop(int(second))
    labels = [0] * count
    for label, group in enumerate(sorted(members.values(), key=min)):
        for index in group:
            labels[index] = label
    return labels
