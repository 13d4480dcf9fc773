"""Presets of shared-expert upcycling: DeepSeekMoE's isolation and DeepSpeed's residual form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import drift, operate, stock, tensors

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("parent", ["llama", "qwen2", "hunyuan_v1_dense"])
def test_all_segments_with_equal_weights_are_the_feed_forward(
    parent: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Shared and routed segments of one partition: nothing is lost if everything is selected."""
    source = checkpoint(parent, intermediate_size=64)
    options = {"experts": 3, "top_k": 3, "preset": "isolated", "router_std": 1e-9}
    operate("upcycle", "shared", source, tmp_path / "out", **options)
    assert drift(source, tmp_path / "out") < 1e-4


def test_neurons_are_dealt_once_and_the_strongest_are_shared(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen2", intermediate_size=64)
    options = {"experts": 6, "top_k": 2, "preset": "isolated", "isolated": 2}
    operate("upcycle", "shared", source, tmp_path / "out", **options)
    before, after = tensors(source), tensors(tmp_path / "out")
    place = "model.layers.1.mlp."
    rows = {
        tuple(row.tolist()): neuron for neuron, row in enumerate(before[f"{place}gate_proj.weight"])
    }
    shared = [rows[tuple(r.tolist())] for r in after[f"{place}shared_expert.gate_proj.weight"]]
    routed = [
        rows[tuple(row.tolist())]
        for expert in range(6)
        for row in after[f"{place}experts.{expert}.gate_proj.weight"]
    ]
    assert sorted(shared + routed) == list(range(64))
    norms = [
        torch.linalg.vector_norm(before[f"{place}{leaf}_proj.weight"].double(), dim=axis)
        for leaf, axis in (("gate", 1), ("up", 1), ("down", 0))
    ]
    strength = norms[0] * norms[1] * norms[2]
    assert sorted(shared) == sorted(strength.topk(16).indices.tolist())


def test_residual_is_exact_with_one_expert(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    result = operate("upcycle", "shared", source, tmp_path / "out", experts=4, preset="residual")
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, tmp_path / "out") < 1e-4
    config = stock(tmp_path / "out").config
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (1, False)


def test_segments_of_unequal_width_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    with pytest.raises(InputError, match="cannot be cut"):
        operate("upcycle", "shared", source, tmp_path / "out", experts=6, preset="isolated")
    with pytest.raises(UsageError, match="sets the width itself"):
        operate(
            "upcycle",
            "shared",
            source,
            tmp_path / "out",
            experts=5,
            preset="isolated",
            expert_width=8,
        )
