"""Experts as a base and changes of low rank: known answers, and the custom modules against stock ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import (
    custom,
    custom_logits,
    drift,
    logits,
    operate,
    rewrite,
    tensors,
    token_ids,
)

Checkpoint = Callable[..., Path]
FAMILIES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "flex_olmo",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "dots1",
    "granitemoe",
    "granitemoeshared",
    "minimax_m2",
    "ernie4_5_moe",
    "hunyuan_v1_moe",
    "cohere2_moe",
    "qwen3_next",
    "phimoe",
]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_every_family_again(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    ids = token_ids(source)
    full = 32 if family == "mixtral" else 24
    rank = f"1-5:{full};6,7:full"
    result = operate("expert", "lowrank", source, tmp_path / "out", rank=rank)
    assert result["exactness"]["kind"] == "exact"
    difference = custom_logits(tmp_path / "out", ids) - logits(source, ids)
    assert float(difference.abs().max()) < 1e-4


def test_rank_zero_makes_every_expert_the_base(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("flex_olmo")
    before = tensors(source)
    same = {
        name: before[name.replace(f"experts.{expert}.", "experts.2.")].clone()
        for name in before
        for expert in range(8)
        if f"experts.{expert}." in name
    }
    clones = rewrite(source, tmp_path / "clones", same)
    ids = token_ids(source)
    for form, read in (("factors", custom_logits), ("dense", logits)):
        operate("expert", "lowrank", source, tmp_path / form, rank="0", base="2", form=form)
        torch.testing.assert_close(
            read(tmp_path / form, ids), logits(clones, ids), rtol=0, atol=1e-5
        )
    names = [name for name in tensors(tmp_path / "factors") if ".experts." in name]
    assert all(".experts.base." in name for name in names)
    assert len(names) == 3 * 3


@pytest.mark.parametrize("base", ["0", "mean"])
def test_what_is_lost_is_the_sum_of_the_dropped_squares(
    base: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    operate("expert", "lowrank", source, tmp_path / "out", rank="5", base=base, form="dense")
    before, after = tensors(source), tensors(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lost = whole = 0.0
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        name = "model.layers.1.mlp.experts.{}." + leaf + ".weight"
        all_E = np.stack([before[name.format(e)].double().numpy() for e in range(8)])
        origin = all_E[0] if base == "0" else all_E.mean(0)
        values = np.linalg.svd(all_E[3] - origin, compute_uv=False)
        squares = ((all_E[3] - after[name.format(3)].double().numpy()) ** 2).sum()
        assert squares == pytest.approx((values[5:] ** 2).sum(), rel=1e-5)
        lost, whole = lost + (values[5:] ** 2).sum(), whole + (values**2).sum()
    unit = report["units"]["layer.1.expert.3"]
    assert unit["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6)


def test_stored_numbers_are_those_of_the_factors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("mixtral")
    operate("expert", "lowrank", source, tmp_path / "out", rank="1-4:3;5-7:7")
    stored = {name: value.numel() for name, value in tensors(tmp_path / "out").items()}
    experts = sum(count for name, count in stored.items() if ".experts." in name)
    base, each = 3 * 32 * 48, 3 * (32 + 48)
    assert experts == 3 * (base + (4 * 3 + 3 * 7) * each)


def test_factors_and_dense_are_one_function(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("olmoe")
    ids = token_ids(source)
    for form in ("factors", "dense"):
        operate(
            "expert",
            "lowrank",
            source,
            tmp_path / form,
            schedule="pyramid-up:1-9",
            base="mean",
            form=form,
        )
    found, wanted = custom_logits(tmp_path / "factors", ids), logits(tmp_path / "dense", ids)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float((wanted - logits(source, ids)).abs().max()) > 1e-2
    config = json.loads((tmp_path / "factors" / "config.json").read_text())
    ranks = config["moesurg_lowrank_experts"]["ranks"]
    assert [ranks[str(layer)][0] for layer in range(3)] == [1, 9, 1]


def test_dense_form_where_experts_have_biases(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """gpt-oss: gate and up alternate in one tensor, beside biases that stay."""
    source = checkpoint("gpt_oss")
    operate("expert", "lowrank", source, tmp_path / "out", rank="1-3:24;4:full", form="dense")
    assert drift(source, tmp_path / "out") < 1e-4
    with pytest.raises(InputError, match="no plain feed-forwards"):
        operate("expert", "lowrank", source, tmp_path / "no", rank="4")


def test_it_generates_with_a_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    operate("expert", "lowrank", source, tmp_path / "out", rank="4")
    model: Any = custom(tmp_path / "out")
    ids = token_ids(source, rows=2)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "--rank or --schedule"),
        ({"rank": "2", "schedule": "2"}, UsageError, "--rank or --schedule"),
        ({"rank": "33"}, InputError, "at most 32"),
        ({"rank": "-1"}, UsageError, "is no rank"),
        ({"rank": "8:2"}, UsageError, "no expert 8"),
        ({"rank": "2", "base": "9"}, UsageError, "is no expert"),
        ({"schedule": "up:1-2"}, UsageError, "is no schedule"),
    ],
)
def test_ranks_that_mean_nothing_are_refused(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        operate("expert", "lowrank", checkpoint("mixtral"), tmp_path / "out", **options)


@pytest.mark.parametrize("family", ["mixtral", "hunyuan_v1_moe", "deepseek_v3"])
def test_expanding_gives_the_dense_form(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    options = {"rank": "1-3:4;5:full;6:0", "base": "mean"}
    operate("expert", "lowrank", source, tmp_path / "custom", **options)
    operate("expert", "lowrank", source, tmp_path / "dense", form="dense", **options)
    operate("convert", "expand", tmp_path / "custom", tmp_path / "stock")
    assert drift(tmp_path / "dense", tmp_path / "stock") < 1e-4
