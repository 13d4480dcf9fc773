"""Splitting: a partition of the neurons, the dense function with all parts on, and clusters that are found."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.linalg.balanced import assign, balanced_kmeans
from tests.oracle.helpers import PAIRS, drift, operate, rewrite, stock, tensors

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(("family", "target"), PAIRS)
@pytest.mark.parametrize("by", ["random", "kmeans"])
def test_all_parts_together_are_the_dense_function(
    checkpoint: Checkpoint, tmp_path: Path, family: str, target: str, by: str
) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    options: dict[str, Any] = {"by": by, "router": "uniform", "target": target}
    result = operate("upcycle", "split", source, output, experts=3, top_k=3, **options)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_shared_neurons_are_always_on(checkpoint: Checkpoint, tmp_path: Path, family: str) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    options: dict[str, Any] = {"router": "uniform", "shared_neurons": 8}
    operate("upcycle", "split", source, output, experts=5, top_k=5, **options)
    assert drift(source, output) < 1e-4
    moe, dense = tensors(output), tensors(source)
    gate, up, down = (dense[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    importance = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = importance.topk(8).indices.sort().values
    assert torch.equal(moe["model.layers.0.mlp.shared_expert.up_proj.weight"], up[kept])


@pytest.mark.parametrize("options", [{"by": "random"}, {"by": "kmeans"}])
def test_every_neuron_is_in_one_expert(
    checkpoint: Checkpoint, tmp_path: Path, options: dict[str, Any]
) -> None:
    source, output = checkpoint("llama", dtype="bfloat16"), tmp_path / "moe"
    result = operate("upcycle", "split", source, output, experts=6, **options)
    assert result["exactness"]["kind"] == "approximate"
    dense, moe = tensors(source), tensors(output)
    for layer in range(3):
        gate = dense[f"model.layers.{layer}.mlp.gate_proj.weight"]
        down = dense[f"model.layers.{layer}.mlp.down_proj.weight"]
        found = []
        for number in range(6):
            name = f"model.layers.{layer}.block_sparse_moe.experts.{number}."
            same = (moe[f"{name}w1.weight"][:, None] == gate[None]).all(dim=2).nonzero()[:, 1]
            # The default scale is top-k.
            assert torch.equal(moe[f"{name}w2.weight"], 2 * down[:, same])
            found.extend(same.tolist())
        assert sorted(found) == list(range(48))
    stock(output)


def test_small_logits_weigh_selected_experts_alike(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With all parts on, what is left of the difference from the dense model is the difference of weights."""
    source, found = checkpoint("llama"), []
    for number, sharpness in enumerate((1.0, 2.0**-7, 2.0**-20)):
        output = tmp_path / str(number)
        operate("upcycle", "split", source, output, experts=3, top_k=3, sharpness=sharpness)
        found.append(drift(source, output))
    assert found[1] < found[0] / 20
    assert found[2] < 1e-4


def test_planted_groups_are_found_and_routed_to(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Gate rows in four orthogonal bundles, shuffled: each becomes an expert whose tokens come to it."""
    source = checkpoint("llama")
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q[:4]
    bundle = torch.arange(4).repeat_interleave(12)[torch.randperm(48, generator=generator)]
    gate = axes[bundle] * 3 + 0.1 * torch.randn(48, 32, generator=generator)
    planted = rewrite(source, tmp_path / "planted", {"model.layers.0.mlp.gate_proj.weight": gate})
    operate("upcycle", "split", planted, tmp_path / "moe", experts=4, top_k=1)
    moe = tensors(tmp_path / "moe")
    rows = moe["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.allclose(rows.norm(dim=1), torch.full((4,), 2.0**-7))
    owner = {}
    for number in range(4):
        stored = moe[f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight"]
        bundles = {int(bundle[(gate == row).all(dim=1)]) for row in stored}
        assert len(bundles) == 1
        owner[bundles.pop()] = number
        mean = (stored / stored.norm(dim=1, keepdim=True)).mean(dim=0)
        assert torch.allclose(rows[number] * 128, mean / mean.norm(), atol=1e-6)
    for axis in range(4):
        assert int((rows @ axes[axis]).argmax()) == owner[axis]


def test_the_assignment_is_the_best_there_is() -> None:
    cost = np.random.default_rng(1).random((6, 3))
    best = min(
        (sum(cost[point, label] for point, label in enumerate(labels)), labels)
        for labels in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    )
    assert tuple(assign(cost, 2)) == best[1]


@pytest.mark.parametrize("clusters", [1, 3, 10, 30])
def test_balanced_clusters_never_get_worse(clusters: int) -> None:
    points = np.random.default_rng(2).standard_normal((30, 4))
    found = balanced_kmeans(points, clusters, np.random.default_rng(0), iterations=30)
    assert found.members_KN.shape == (clusters, 30 // clusters)
    assert sorted(found.members_KN.ravel()) == list(range(30))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found.inertia))
    for members, centre in zip(found.members_KN, found.centres_KD, strict=True):
        np.testing.assert_allclose(points[members].mean(axis=0), centre)


def test_equal_points_are_no_obstacle() -> None:
    found = balanced_kmeans(np.ones((8, 3)), 4, np.random.default_rng(0), iterations=5)
    assert sorted(found.members_KN.ravel()) == list(range(8))
    assert found.inertia == (0.0,)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"experts": 5}, InputError, "do not divide into 5"),
        ({"experts": 8}, InputError, "experts of 6 neurons do not run"),
        ({"experts": 4, "shared_neurons": 6}, InputError, "48 neurons without 6 shared"),
        ({"experts": 4, "shared_neurons": 8, "target": "mixtral"}, InputError, "no shared expert"),
        ({"experts": 4, "router": "uniform"}, InputError, "same experts"),
        ({"experts": 4, "by": "random", "router": "centroid"}, UsageError, "no centroids"),
        ({"experts": 4, "scale": 0.0}, UsageError, "above 0"),
        ({"experts": 4, "iterations": 0}, UsageError, "at least 1"),
    ],
)
def test_what_cannot_be_split_is_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        operate("upcycle", "split", checkpoint("llama"), tmp_path / "moe", **options)
