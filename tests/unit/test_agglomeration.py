"""Hierarchical clustering: hand-made points, SciPy's own cut, and equal distances."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as tree_of

from moesurg.surgery.linalg.agglomeration import LINKAGES, agglomerate


def partition(labels: list[int]) -> set[frozenset[int]]:
    return {
        frozenset(index for index, other in enumerate(labels) if other == label)
        for label in set(labels)
    }


@pytest.mark.parametrize("linkage", LINKAGES)
def test_every_linkage_merges_the_nearest(linkage: str) -> None:
    """Also complete linkage, which a published implementation gets the wrong way round."""
    points = np.array([[0.0], [1.0], [10.0], [11.0]])
    assert agglomerate(points, 2, linkage) == [0, 0, 1, 1]


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("clusters", [1, 2, 5, 9, 12])
def test_it_is_scipys_cut(linkage: str, clusters: int) -> None:
    points = np.random.default_rng(4).normal(size=(12, 3))
    cut = fcluster(tree_of(points, linkage), clusters, "maxclust")  # type: ignore[arg-type]
    assert partition(agglomerate(points, clusters, linkage)) == partition(list(cut))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_the_order_of_points_changes_only_labels(linkage: str) -> None:
    rng = np.random.default_rng(5)
    points, order = rng.normal(size=(10, 4)), rng.permutation(10)
    found = agglomerate(points, 4, linkage)
    shuffled = agglomerate(points[order], 4, linkage)
    back = [0] * 10
    for place, original in enumerate(order):
        back[original] = shuffled[place]
    assert partition(found) == partition(back)


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("clusters", [1, 3, 6, 7])
def test_equal_points_still_give_the_number_asked_for(linkage: str, clusters: int) -> None:
    points = np.array([[1.0, 2.0]] * 5 + [[3.0, 1.0]] * 2)
    found = agglomerate(points, clusters, linkage)
    assert sorted(set(found)) == list(range(clusters))
    if clusters == 3:
        assert not {0, 1, 2, 3, 4} & {5, 6} or found[5] not in found[:5]
