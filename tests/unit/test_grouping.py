"""Who is merged with whom: known answers of M-SMoE's and Sub-MoE's decisions."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesurg.surgery.errors import InputError, MoesurgError
from moesurg.surgery.linalg.allocation import allocate
from moesurg.surgery.methods.experts import m_smoe, sub_moe
from moesurg.surgery.methods.experts._groups import check, from_labels


def model(layers: int, top_k: int = 1) -> Any:
    """What a decision looks at: the indices of MoE layers, and top-k."""
    return SimpleNamespace(
        moe_layers=[SimpleNamespace(index=index) for index in range(layers)],
        rule=SimpleNamespace(top_k=top_k),
    )


class Table:
    """Statistics made by hand."""

    def __init__(self, *layers: SimpleNamespace) -> None:
        self._layers = layers

    def layer(self, index: int) -> SimpleNamespace:
        return self._layers[index]


def counted(*counts: float, logits: np.ndarray[Any, Any] | None = None) -> SimpleNamespace:
    size = len(counts)
    rows = np.eye(size) if logits is None else logits
    norms = np.linalg.norm(rows, axis=1)
    cosine = rows @ rows.T / np.outer(norms, norms)
    return SimpleNamespace(count_E=np.array(counts), tokens=100.0, logit_cosine_EE=cosine, index=0)


def test_global_allocation_takes_exactly_as_many_as_asked() -> None:
    """A skewed and a uniform layer, four groups in all: the published threshold finds two."""
    skewed, uniform = counted(0.97, 0.01, 0.01, 0.01), counted(0.25, 0.25, 0.25, 0.25)
    options = m_smoe.Options(experts=2, router="tied", allocation="global")
    decided = m_smoe.decide(model(2), options, Table(skewed, uniform), 0)
    sizes = [len(decided[str(layer)]["groups"]) for layer in range(2)]
    assert sum(sizes) == 4
    assert sizes == [1, 3]


def test_a_uniform_layer_keeps_all_before_a_skewed_one_keeps_a_second() -> None:
    skewed, uniform = counted(0.97, 0.01, 0.01, 0.01), counted(0.25, 0.25, 0.25, 0.25)
    options = m_smoe.Options(experts=3, router="tied", allocation="global")
    decided = m_smoe.decide(model(2), options, Table(skewed, uniform), 0)
    assert [len(decided[str(layer)]["groups"]) for layer in range(2)] == [2, 4]


def test_opposite_router_rows_group_with_their_own_kind() -> None:
    rows = np.array([[1.0, 0.05], [0.05, 1.0], [1.0, 0.0], [0.0, 1.0]])
    layer = counted(10, 9, 1, 1, logits=rows)
    decided = m_smoe.decide(model(1), m_smoe.Options(experts=2), Table(layer), 0)
    assert decided["0"]["groups"] == [[0, 2], [1, 3]]
    assert decided["0"]["representatives"] == [0, 1]
    assert decided["0"]["weights"][0] == pytest.approx([10 / 11, 1 / 11])


def test_dominant_experts_tie_to_the_lowest_index() -> None:
    decided = m_smoe.decide(model(1), m_smoe.Options(experts=2), Table(counted(5, 5, 5, 5)), 0)
    assert decided["0"]["representatives"] == [0, 1]


def test_statistics_without_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="saw no token"):
        m_smoe.decide(model(1), m_smoe.Options(experts=2), Table(counted(0, 0, 0, 0)), 0)


def test_an_unused_group_is_averaged_uniformly() -> None:
    grouping = from_labels([0, 0, 1, 1], [0.0, 0.0, 3.0, 1.0])
    assert grouping.weights == ((0.5, 0.5), (0.75, 0.25))
    assert grouping.representatives == (0, 2)


def test_a_decision_that_is_no_partition_is_refused() -> None:
    good = from_labels([0, 0, 1, 1], [1.0] * 4).to_json()
    assert check(good, 4, 2).groups == ((0, 1), (2, 3))
    with pytest.raises(MoesurgError, match="no partition"):
        check({**good, "groups": [[0, 1], [1, 2]]}, 4, 2)
    with pytest.raises(MoesurgError, match="planned 3 groups"):
        check(good, 4, 3)


def outputs(*points: list[float]) -> SimpleNamespace:
    rows = np.array(points)
    gram = rows @ rows.T
    norms = np.linalg.norm(rows, axis=1)
    return SimpleNamespace(
        count_E=np.arange(len(points), 0, -1).astype(float),
        tokens=1.0,
        output_gram_mean_EE=gram,
        output_cosine_mean_EE=gram / np.outer(norms, norms),
    )


def test_clustering_is_of_the_outputs_themselves() -> None:
    layer = outputs([0.0, 1.0], [10.0, 1.0], [1.0, 1.0], [11.0, 1.0])
    decided = sub_moe.decide(model(1), sub_moe.Options(experts=2), Table(layer), 0)
    assert decided["0"]["groups"] == [[0, 2], [1, 3]]
    assert decided["0"]["objective"] == pytest.approx(1.0)


def test_cosine_ignores_how_long_outputs_are() -> None:
    layer = outputs([1.0, 0.0], [0.0, 1.0], [100.0, 1.0], [1.0, 100.0])
    options = sub_moe.Options(experts=2, metric="cosine")
    decided = sub_moe.decide(model(1), options, Table(layer), 0)
    assert decided["0"]["groups"] == [[0, 2], [1, 3]]


def test_identical_experts_fill_every_group() -> None:
    layer = outputs(*[[1.0, 2.0]] * 4)
    decided = sub_moe.decide(model(1), sub_moe.Options(experts=2), Table(layer), 0)
    assert len(decided["0"]["groups"]) == 2


def test_allocation_is_the_optimum_of_all_allocations() -> None:
    rng = np.random.default_rng(3)
    curves = {
        layer: dict(enumerate(sorted(rng.random(5), reverse=True), start=1)) for layer in range(3)
    }
    found = allocate(curves, 8)
    assert sum(found.values()) == 8
    cost = sum(curves[layer][count] for layer, count in found.items())
    best = min(
        sum(curves[layer][count] for layer, count in enumerate(counts))
        for counts in itertools.product(range(1, 6), repeat=3)
        if sum(counts) == 8
    )
    assert cost == pytest.approx(best)


def test_an_impossible_allocation_is_refused() -> None:
    with pytest.raises(InputError, match="adds up to 3"):
        allocate({0: {2: 0.5}, 1: {2: 0.5}}, 3)
