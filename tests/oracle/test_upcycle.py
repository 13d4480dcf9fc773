"""Sparse upcycling: exact where the target's router allows it, by stock transformers' own account."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import drift, operate, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
PAIRS = [
    ("llama", "mixtral"),
    ("mistral", "mixtral"),
    ("llama", "qwen2_moe"),
    ("mistral", "qwen2_moe"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
    ("granite", "granitemoe"),
    ("olmo2", "flex_olmo"),
    ("ernie4_5", "ernie4_5_moe"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    ("cohere2", "cohere2_moe"),
]


@pytest.mark.parametrize(("parent", "target"), PAIRS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_pair_reproduces_its_parent(
    checkpoint: Checkpoint, tmp_path: Path, parent: str, target: str, top_k: int
) -> None:
    source, output = checkpoint(parent), tmp_path / "moe"
    result = operate("upcycle", "sparse", source, output, experts=4, top_k=top_k, target=target)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4


def test_a_window_survives_in_a_family_of_another_lineage(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("mistral", sliding_window=5), tmp_path / "moe"
    operate("upcycle", "sparse", source, output, experts=4, target="qwen2_moe")
    assert drift(source, output) < 1e-4


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 16}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", {"attention_bias": True}),
]


@pytest.mark.parametrize(("parent", "config"), CONFIGS)
def test_settings_of_the_parent_survive(
    checkpoint: Checkpoint, tmp_path: Path, parent: str, config: dict[str, Any]
) -> None:
    source, output = checkpoint(parent, **config), tmp_path / "moe"
    operate("upcycle", "sparse", source, output, experts=4)
    assert drift(source, output) < 1e-4


def test_greedy_continuations_are_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    operate("upcycle", "sparse", source, output, experts=4)
    ids = token_ids(source, rows=1)
    first, second = (
        stock(folder).generate(ids, max_new_tokens=16, do_sample=False)
        for folder in (source, output)
    )
    assert torch.equal(first, second)


def test_experts_are_the_parents_bytes_and_router_has_the_std(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("llama", dtype="bfloat16"), tmp_path / "moe"
    operate("upcycle", "sparse", source, output, experts=8, router_std=0.5)
    dense, moe = tensors(source), tensors(output)
    routers = []
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        for stored, parent in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            for expert in range(8):
                name = f"{prefix}block_sparse_moe.experts.{expert}.{stored}.weight"
                assert torch.equal(moe[name], dense[f"{prefix}mlp.{parent}_proj.weight"])
        routers.append(moe[f"{prefix}block_sparse_moe.gate.weight"].float())
    drawn = torch.stack(routers)
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.1)
    assert not torch.equal(drawn[0], drawn[1])


def test_noise_touches_the_asked_fraction_of_neurons(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    result = operate("upcycle", "sparse", source, output, experts=2, noise=0.1, noise_fraction=0.25)
    assert result["exactness"]["kind"] == "approximate"
    dense, moe = tensors(source), tensors(output)
    gate = dense["model.layers.0.mlp.gate_proj.weight"]
    experts = [moe[f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight"] for e in range(2)]
    for expert in experts:
        changed = (expert != gate).any(dim=1)
        assert int(changed.sum()) == gate.shape[0] // 4
        noise = (expert - gate)[changed]
        assert float(noise.std()) == pytest.approx(0.1, rel=0.25)
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize(
    ("parent", "config", "options", "sentence"),
    [
        ("llama", {}, {"experts": 2, "top_k": 3}, "more than --experts"),
        ("llama", {}, {"experts": 4, "target": "qwen3_moe"}, "its attention differs"),
        ("llama", {"mlp_bias": True}, {"experts": 4}, "mlp_bias is set"),
        ("mixtral", {}, {"experts": 4}, "is a mixture already"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            {"experts": 4},
            "mixes full and sliding",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_with_the_reason(
    checkpoint: Checkpoint,
    tmp_path: Path,
    parent: str,
    config: dict[str, Any],
    options: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(InputError, match=sentence):
        operate("upcycle", "sparse", checkpoint(parent, **config), tmp_path / "moe", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"noise": -1.0}, {"router_std": 0.0}, {"noise_fraction": 2.0}])
def test_impossible_options_are_usage_errors(
    checkpoint: Checkpoint, tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(UsageError):
        operate("upcycle", "sparse", checkpoint("llama"), tmp_path / "moe", experts=4, **options)
