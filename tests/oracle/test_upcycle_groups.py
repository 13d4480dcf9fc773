"""Virtual groups and shared experts: exact by rules on the router, held against stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods.upcycle.virtual_groups import nvidia_factor
from tests.oracle.helpers import PAIRS, drift, operate, rewrite, stock, tensors

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(("family", "target"), PAIRS)
@pytest.mark.parametrize(
    ("experts", "shards", "top_k"), [(4, 2, 2), (4, 2, 4), (6, 3, 3), (4, 1, 3)]
)
def test_whole_groups_give_the_dense_function(
    checkpoint: Checkpoint,
    tmp_path: Path,
    family: str,
    target: str,
    experts: int,
    shards: int,
    top_k: int,
) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    result = operate(
        "upcycle", "virtual-groups", source, output,
        experts=experts, granularity=shards, top_k=top_k, target=target,
    )  # fmt: skip
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4


def test_shards_lie_in_turn_and_rows_are_tied(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("llama", dtype="bfloat16"), tmp_path / "moe"
    operate("upcycle", "virtual-groups", source, output, experts=6, granularity=2)
    dense, moe = tensors(source), tensors(output)
    prefix = "model.layers.2."
    rows = moe[f"{prefix}block_sparse_moe.gate.weight"]
    for number in range(6):
        part = slice(24 * (number % 2), 24 * (number % 2) + 24)
        name = f"{prefix}block_sparse_moe.experts.{number}."
        assert torch.equal(moe[f"{name}w1.weight"], dense[f"{prefix}mlp.gate_proj.weight"][part])
        assert torch.equal(moe[f"{name}w3.weight"], dense[f"{prefix}mlp.up_proj.weight"][part])
        # Doubling is lossless in bfloat16.
        down = dense[f"{prefix}mlp.down_proj.weight"][:, part]
        assert torch.equal(moe[f"{name}w2.weight"], 2 * down)
        assert torch.equal(rows[number], rows[number - number % 2])
    assert len({tuple(row.tolist()) for row in rows}) == 3


@pytest.mark.parametrize(
    ("options", "breaks"),
    [({"scale": "none"}, True), ({"scale": "nvidia"}, True), ({"scale": "exact"}, False)],
)
def test_only_the_exact_scale_is_exact(
    checkpoint: Checkpoint, tmp_path: Path, options: dict[str, Any], breaks: bool
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    result = operate(
        "upcycle", "virtual-groups", source, output, experts=4, granularity=2, **options
    )
    assert (result["exactness"]["kind"] == "approximate") == breaks
    assert (drift(source, output) > 1e-2) == breaks


@pytest.mark.parametrize(("shards", "kind"), [(2, "exact"), (3, "approximate")])
def test_a_scale_that_rounds_is_told(
    checkpoint: Checkpoint, tmp_path: Path, shards: int, kind: str
) -> None:
    source, output = checkpoint("llama", dtype="bfloat16"), tmp_path / "moe"
    options = {"experts": 6, "granularity": shards, "top_k": shards}
    result = operate("upcycle", "virtual-groups", source, output, **options)
    assert result["exactness"]["kind"] == kind
    assert (drift(source, output) < 1e-4) == (kind == "exact")


def test_untied_rows_break_what_tied_rows_keep(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The oracle sees the difference that the method is about."""
    source, output = checkpoint("llama"), tmp_path / "moe"
    operate("upcycle", "virtual-groups", source, output, experts=4, granularity=2)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    rows = tensors(output)[name]
    swapped = rewrite(output, tmp_path / "swapped", {name: rows[[0, 2, 1, 3]].contiguous()})
    assert drift(source, swapped) > 1e-2


def test_published_scales() -> None:
    assert nvidia_factor(8, 8, 8, normalised=False) == pytest.approx(4)
    assert nvidia_factor(8, 1, 2, normalised=False) == pytest.approx(1.5874, abs=1e-4)
    assert nvidia_factor(8, 1, 1, normalised=False) == pytest.approx(2)
    assert nvidia_factor(8, 8, 8, normalised=True) == pytest.approx(2)


def test_the_papers_router_is_not_normalised(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("qwen3"), tmp_path / "moe"
    options: dict[str, Any] = {"granularity": 2, "scale": "nvidia", "normalise": False}
    result = operate("upcycle", "virtual-groups", source, output, experts=4, **options)
    assert result["exactness"]["kind"] == "approximate"
    assert stock(output).config.norm_topk_prob is False
    dense, moe = tensors(source), tensors(output)
    factor = (2 * 4 / 2) ** (1 / 3)
    up = dense["model.layers.0.mlp.up_proj.weight"][:24] * factor
    assert torch.allclose(moe["model.layers.0.mlp.experts.2.up_proj.weight"], up)


def test_dynamic_dino_takes_one_group_per_token(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("qwen3"), tmp_path / "moe"
    operate("upcycle", "virtual-groups", source, output, experts=6, preset="dynamic-dino")
    config = stock(output).config
    assert (config.moe_intermediate_size, config.num_experts_per_tok) == (24, 2)
    assert drift(source, output) < 1e-4


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"experts": 5, "granularity": 2}, InputError, "--experts 5 is not a multiple"),
        ({"experts": 4, "granularity": 2, "top_k": 3}, InputError, "--top-k 3 is not a multiple"),
        ({"experts": 5, "granularity": 5, "top_k": 5}, InputError, "width 48 is not a multiple"),
        ({"experts": 4}, UsageError, "--granularity is needed"),
        ({"experts": 4, "granularity": 0}, UsageError, "at least 1"),
        ({"experts": 4, "granularity": 4, "preset": "dynamic-dino"}, UsageError, "sets the"),
        ({"experts": 4, "granularity": 2, "router_std": 0.0}, UsageError, "equal rows"),
        ({"experts": 4, "granularity": 2, "router_std": 1e-60}, InputError, "tied"),
        ({"experts": 4, "granularity": 2, "normalise": False}, InputError, "always normalises"),
    ],
)
def test_what_breaks_the_identity_is_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        operate("upcycle", "virtual-groups", checkpoint("llama"), tmp_path / "moe", **options)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "granite"])
@pytest.mark.parametrize("width", [None, 20])
def test_a_shared_feed_forward_is_exact_for_any_router(
    checkpoint: Checkpoint, tmp_path: Path, family: str, width: int | None
) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    options: dict[str, Any] = {"experts": 3, "router_std": 5.0, "expert_width": width}
    result = operate("upcycle", "shared", source, output, **options)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    # Not even the normalisation matters.
    config = (output / "config.json").read_text()
    (output / "config.json").write_text(
        config.replace('"norm_topk_prob": true', '"norm_topk_prob": false')
    )
    assert drift(source, output) < 1e-4


def test_the_gate_halves_what_is_doubled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("qwen2", dtype="bfloat16"), tmp_path / "moe"
    operate("upcycle", "shared", source, output, experts=3, expert_width=24)
    dense, moe = tensors(source), tensors(output)
    prefix = "model.layers.1.mlp."
    assert not moe[f"{prefix}shared_expert_gate.weight"].any()
    assert torch.equal(
        moe[f"{prefix}shared_expert.down_proj.weight"], 2 * dense[f"{prefix}down_proj.weight"]
    )
    chosen = []
    for number in range(3):
        name = f"{prefix}experts.{number}."
        assert not moe[f"{name}down_proj.weight"].any()
        same = (
            moe[f"{name}gate_proj.weight"][:, None] == dense[f"{prefix}gate_proj.weight"][None]
        ).all(dim=2)
        assert (same.sum(dim=1) == 1).all()
        chosen.append(tuple(same.nonzero()[:, 1].tolist()))
    assert len(set(chosen)) == 3


@pytest.mark.parametrize(
    ("family", "options", "sentence"),
    [
        ("llama", {"target": "mixtral"}, "it has no shared expert"),
        ("qwen3", {}, "no supported MoE family with a shared expert"),
        ("llama", {"expert_width": 49}, "has 48 neurons"),
    ],
)
def test_families_without_a_shared_expert_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, family: str, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        operate("upcycle", "shared", checkpoint(family), tmp_path / "moe", experts=2, **options)


def test_granite_keeps_its_feed_forward_in_one_matrix_of_gate_and_up(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The multipliers stay, and so does which family is written where no shared expert is asked for."""
    source = checkpoint("granite", dtype="bfloat16", residual_multiplier=0.3, logits_scaling=7.0)
    operate("upcycle", "shared", source, tmp_path / "moe", experts=3, expert_width=16)
    dense, moe = tensors(source), tensors(tmp_path / "moe")
    ffn, prefix = "model.layers.1.mlp.", "model.layers.1.shared_mlp."
    both = torch.cat([dense[f"{ffn}gate_proj.weight"], dense[f"{ffn}up_proj.weight"]])
    assert torch.equal(moe[f"{prefix}input_linear.weight"], both)
    assert torch.equal(moe[f"{prefix}output_linear.weight"], dense[f"{ffn}down_proj.weight"])
    config = stock(tmp_path / "moe").config
    assert config.model_type == "granitemoeshared"
    assert (config.residual_multiplier, config.logits_scaling) == (0.3, 7.0)
    assert config.shared_intermediate_size == both.shape[0] // 2
    operate("upcycle", "sparse", source, tmp_path / "plain", experts=3)
    assert stock(tmp_path / "plain").config.model_type == "granitemoe"
    named = {"experts": 3, "target": "granitemoeshared"}
    result = operate("upcycle", "sparse", source, tmp_path / "named", **named)
    assert result["exactness"]["kind"] == "exact"
    assert stock(tmp_path / "named").config.shared_intermediate_size == 0
    assert drift(source, tmp_path / "named") < 1e-4
