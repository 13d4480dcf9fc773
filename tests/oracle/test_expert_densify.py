"""Mixtures back to dense models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.architectures import families
from moesurg.surgery.errors import InputError
from tests.oracle.helpers import drift, operate, stock, tensors

Checkpoint = Callable[..., Path]
PAIRS = [
    (parent, family.model_type)
    for family in families().values()
    if family.target is not None
    for parent in family.target.parents
]


@pytest.mark.parametrize(("parent", "target"), PAIRS)
def test_growing_and_averaging_is_the_dense_model_again(
    parent: str, target: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """On every pair of families; the neutral shared expert of those that need one adds neurons that give zero."""
    source = checkpoint(parent)
    operate("upcycle", "sparse", source, tmp_path / "moe", experts=3, top_k=2, target=target)
    operate("expert", "densify", tmp_path / "moe", tmp_path / "out", target=parent, shared="drop")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert drift(source, tmp_path / "out") < 1e-5


def test_shuffled_copies_are_found_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Drop-upcycling without re-drawing shuffles neurons: the average needs the alignment."""
    source = checkpoint("llama")
    operate("upcycle", "drop", source, tmp_path / "moe", experts=3, top_k=2, reinit=0.0)
    operate("expert", "densify", tmp_path / "moe", tmp_path / "out")
    operate("expert", "densify", tmp_path / "moe", tmp_path / "raw", align=False)
    assert drift(source, tmp_path / "out") < 1e-4
    assert drift(source, tmp_path / "raw") > 1e-2


def test_a_shared_expert_stands_beside_the_average(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Upcycled so that the shared expert is the whole function: dense again, wider by silent neurons."""
    for parent, target in (("qwen2", "qwen2_moe"), ("ernie4_5", "ernie4_5_moe")):
        source, moe, out = checkpoint(parent), tmp_path / target, tmp_path / parent
        operate("upcycle", "shared", source, moe, experts=3, top_k=2, target=target)
        operate("expert", "densify", moe, out)
        assert stock(out).config.intermediate_size == 96
        assert drift(source, out) < 1e-4


def test_weights_come_from_the_router(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With the statistics' own sums, on a router that does not normalise: the mass shrinks the output."""
    source = checkpoint("qwen3_moe", norm_topk_prob=False)
    for weights in ("frequency", "gate"):
        out = tmp_path / weights
        operate("expert", "densify", source, out, weights=weights, align=False)
        decided = json.loads((out / "report.json").read_text())["decisions"]["1"]
        assert sum(decided["weights"]) == pytest.approx(1)
        assert (decided["mass"] == 1) == (weights == "frequency")
        assert 0 < decided["mass"] <= 1
        before, after = tensors(source), tensors(out)
        for leaf, factor in (("gate_proj", 1.0), ("down_proj", decided["mass"])):
            wanted = sum(
                weight * before[f"model.layers.1.mlp.experts.{e}.{leaf}.weight"].double()
                for e, weight in enumerate(decided["weights"])
            )
            found = after[f"model.layers.1.mlp.{leaf}.weight"].double()
            torch.testing.assert_close(found, factor * wanted, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_dense_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cases = {
        "deepseek_v3": "layer 0 has a feed-forward|cannot become dense|cannot be put beside",
        "gpt_oss": "no plain feed-forwards",
        "phimoe": "cannot become dense",
        "llama": "has no experts",
    }
    for family, message in cases.items():
        with pytest.raises(InputError, match=message):
            operate("expert", "densify", checkpoint(family), tmp_path / "out")
    with pytest.raises(InputError, match="cannot become llama"):
        operate("expert", "densify", checkpoint("qwen3_moe"), tmp_path / "out", target="llama")
