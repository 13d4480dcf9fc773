"""Muted experts: who goes, and what switching them off does to the stock model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import drift, operate, stock, tensors

Checkpoint = Callable[..., Path]
TEXTS: dict[str, Any] = {"more": "python", "less": "english"}


def decided(folder: Path) -> dict[int, dict[str, Any]]:
    found = json.loads((folder / "report.json").read_text())["decisions"]
    return {int(layer): value for layer, value in found.items()}


def test_the_most_different_experts_of_the_model_go(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3")
    operate("expert", "mute", source, tmp_path / "out", count=3, by="bias", **TEXTS)
    found = decided(tmp_path / "out")
    ranked = sorted(
        (-value, layer, expert)
        for layer, told in found.items()
        for expert, value in enumerate(told["difference"])
    )
    # Each group of the router can spare one of its experts at least, so that the first one always goes.
    assert ranked[0][2] in found[ranked[0][1]]["muted"]
    assert sum(len(told["muted"]) for told in found.values()) == 3
    least = min(found[i]["difference"][e] for i in found for e in found[i]["muted"])
    assert least > 0
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("e_score_correction_bias" in name for name in changed)
    for name in changed:
        muted = found[int(name.split(".")[2])]["muted"]
        assert (before[name] != after[name]).nonzero().flatten().tolist() == muted


@pytest.mark.parametrize("family", ["gpt_oss", "dots1"])
def test_a_bias_is_the_same_function_as_removal(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    for by in ("bias", "removal"):
        options = {**TEXTS, "count": 2, "per": "layer", "by": by}
        operate("expert", "mute", source, tmp_path / by, **options)
    assert decided(tmp_path / "bias") == decided(tmp_path / "removal")
    assert drift(tmp_path / "bias", tmp_path / "removal") < 1e-5
    assert drift(source, tmp_path / "bias") > 1e-4


def test_removal_over_the_model_leaves_ragged_layers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("gpt_oss")
    operate("expert", "mute", source, tmp_path / "removal", count=3, by="removal", **TEXTS)
    operate("expert", "mute", source, tmp_path / "bias", count=3, **TEXTS)
    assert decided(tmp_path / "bias") == decided(tmp_path / "removal")
    stock(tmp_path / "removal")
    assert drift(tmp_path / "bias", tmp_path / "removal") < 1e-5


def test_texts_and_numbers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    for wrong, said in (
        ({**TEXTS, "count": 0}, "1 to"),
        ({**TEXTS, "count": 99}, "1 to"),
        ({"more": "python", "less": "python", "count": 1}, "both"),
    ):
        with pytest.raises(UsageError, match=said):
            operate("expert", "mute", source, tmp_path / "x", **wrong)
    with pytest.raises(InputError, match="no bias that switches"):
        operate("expert", "mute", source, tmp_path / "x", count=1, by="bias", **TEXTS)
    with pytest.raises(InputError, match="no domain 'latin'"):
        operate("expert", "mute", source, tmp_path / "x", count=1, more="latin", less="python")
