"""Known answers of REAM's, HC-SMoE's and MergeMoE's decisions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods.experts import hc_smoe, mergemoe, ream


def similarity(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    points = np.random.default_rng(seed).normal(size=(count, 5))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found: np.ndarray[Any, Any] = points @ points.T
    return found


def test_few_centroids_absorb_all_that_is_dropped() -> None:
    """128 experts to 96 in groups of 16: two full groups and one with two."""
    salience = list(np.random.default_rng(1).random(128) + 0.1)
    found = ream.group(salience, similarity(128), 96, 16)
    sizes = sorted(len(group) for group in found.groups)
    assert sizes == [1] * 93 + [3, 16, 16]
    order = found.details["centroids"]
    assert [salience[expert] for expert in order] == sorted(salience, reverse=True)[:96]
    large = {
        representative: len(group)
        for group, representative in zip(found.groups, found.representatives, strict=True)
        if len(group) > 1
    }
    assert [large[expert] for expert in order[:3]] == [16, 16, 3]
    for group, weights in zip(found.groups, found.weights, strict=True):
        total = sum(salience[expert] for expert in group)
        assert weights == pytest.approx([salience[expert] / total for expert in group])


def test_a_centroid_takes_the_nearest_first() -> None:
    table = np.array(
        [[1, 0.1, 0.9, 0.8], [0.1, 1, 0.95, 0.2], [0.9, 0.95, 1, 0.5], [0.8, 0.2, 0.5, 1]]
    )
    assert ream.group([4.0, 3.0, 2.0, 1.0], table, 2, 2).groups == ((0, 2), (1, 3))
    assert ream.group([3.0, 4.0, 2.0, 1.0], table, 2, 2).groups == ((0, 3), (1, 2))
    assert ream.group([4.0, 3.0, 2.0, 1.0], table, 2, 0).groups == ((0, 3), (1, 2))


def test_equal_saliency_and_similarity_go_to_the_lowest_index() -> None:
    found = ream.group([1.0] * 6, np.ones((6, 6)), 3, 3)
    assert found.groups == ((0, 3, 4), (1, 5), (2,))


def test_saliency_uses_the_gate_once_and_replaces_zeros() -> None:
    layer: Any = SimpleNamespace(
        gate_norm_E=np.array([9.0, 100.0, 0.0]), count_E=np.array([1.0, 100.0, 0.0])
    )
    assert ream.saliency(layer) == [9.0, 1.0, 0.5]
    layer.gate_norm_E = np.array([0.2, 0.0, 0.0])
    assert ream.saliency(layer) == pytest.approx([0.2, 0.2, 0.2])


def test_too_few_groups_are_refused(checkpoint: Any) -> None:
    model = Model.open(checkpoint("qwen3_moe"))
    with pytest.raises(InputError, match="do not hold 8 experts"):
        ream.plan([model], ream.Options(experts=2, group_size=3))
    assert ream.plan([model], ream.Options(experts=2, group_size=4)).sample == 4096


def test_numbers_without_sense_are_refused(checkpoint: Any) -> None:
    model = Model.open(checkpoint("qwen3_moe"))
    for options, sentence in (
        ({"sample": 0}, "--sample"),
        ({"reconstruct": True, "sweeps": 0}, "--sweeps"),
        ({"reconstruct": True, "ridge": 0.0}, "--ridge"),
    ):
        with pytest.raises(UsageError, match=sentence):
            hc_smoe.plan([model], hc_smoe.Options(experts=4, **options))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--merge-ridge"):
        mergemoe.plan([model], mergemoe.Options(experts=4, merge_ridge=-1.0))
    with pytest.raises(UsageError, match="--group-size"):
        ream.plan([model], ream.Options(experts=4, group_size=-1))


class Statistics:
    """Statistics made by hand, equal for all layers."""

    def __init__(self, **fields: Any) -> None:
        self._layer = SimpleNamespace(**fields)

    def layer(self, index: int) -> Any:
        return self._layer


@pytest.mark.parametrize("basis", ["output", "logits", "rows", "weights"])
def test_hc_smoe_clusters_by_the_basis_asked_for(checkpoint: Any, basis: str) -> None:
    from moesurg.surgery.linalg.agglomeration import agglomerate
    from tests.oracle.helpers import tensors

    folder: Path = checkpoint("qwen3_moe")
    rng = np.random.default_rng(7)
    outputs, logits = rng.normal(size=(8, 6)), rng.normal(size=(8, 50))
    found: Any = Statistics(
        tokens=50.0,
        count_E=np.arange(8.0),
        output_mean_ED=outputs,
        logit_gram_EE=logits @ logits.T,
    )
    stored = tensors(folder)
    prefix = "model.layers.1.mlp."
    points = {
        "output": outputs,
        "logits": logits,
        "rows": stored[prefix + "gate.weight"].numpy(),
        "weights": np.stack(
            [
                np.concatenate(
                    [
                        stored[f"{prefix}experts.{expert}.{name}_proj.weight"].numpy().ravel()
                        for name in ("gate", "up", "down")
                    ]
                )
                for expert in range(8)
            ]
        ),
    }[basis].astype(np.float64)
    options = hc_smoe.Options(experts=3, basis=basis, linkage="complete")
    decided = hc_smoe.decide(Model.open(folder), options, found, 0)["1"]
    labels = agglomerate(points, 3, "complete")
    expected = {tuple(i for i in range(8) if labels[i] == label) for label in range(3)}
    assert {tuple(group) for group in decided["groups"]} == expected
    for group, kept in zip(decided["groups"], decided["representatives"], strict=True):
        assert kept == max(group)


def test_an_unused_cluster_is_averaged_uniformly(checkpoint: Any) -> None:
    points = np.array([[0.0], [0.1], [5.0], [5.1], [9.0], [9.1], [20.0], [20.1]])
    count = np.array([0.0, 0.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    found: Any = Statistics(tokens=6.0, count_E=count, output_mean_ED=points)
    options = hc_smoe.Options(experts=4)
    decided = hc_smoe.decide(Model.open(checkpoint("qwen3_moe")), options, found, 0)["0"]
    assert decided["groups"] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert decided["weights"] == [[0.5, 0.5], [0.75, 0.25], [0.5, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize("align", ["none", "weight"])
def test_mergemoe_joins_the_most_similar_centre(checkpoint: Any, align: str) -> None:
    import torch

    from moesurg.surgery.linalg.permutation import align as matched
    from tests.oracle.helpers import tensors

    folder: Path = checkpoint("qwen3_moe")
    count = np.array([1.0, 9.0, 2.0, 9.0, 3.0, 0.0, 9.0, 1.0])
    found: Any = Statistics(tokens=30.0, count_E=count)
    options = mergemoe.Options(experts=3, align=align)
    decided = mergemoe.decide(Model.open(folder), options, found, 0)["2"]
    assert decided["representatives"] == [1, 3, 6]
    stored = tensors(folder)

    def read(expert: int) -> tuple[torch.Tensor, ...]:
        prefix = f"model.layers.2.mlp.experts.{expert}."
        return tuple(stored[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))

    def likeness(expert: int, centre: int) -> float:
        target, reference = read(expert), read(centre)
        order = torch.arange(len(target[0]))
        if align == "weight":
            order = matched(reference, target).order_F  # type: ignore[arg-type]
        left = torch.cat([target[0][order], target[1][order]]).double().flatten()
        right = torch.cat([reference[0], reference[1]]).double().flatten()
        return float(torch.nn.functional.cosine_similarity(left, right, dim=0))

    for expert in (0, 2, 4, 5, 7):
        best = max((1, 3, 6), key=lambda centre: likeness(expert, centre))
        assert expert in decided["groups"][(1, 3, 6).index(best)]
        assert decided["similarity"][str(expert)] == pytest.approx(likeness(expert, best))
