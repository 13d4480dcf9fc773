"""Composed merges: the presets are compositions, text is asked for only where it is needed, and parts fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods.experts import compose
from tests.oracle.helpers import drift, operate, stock, tensors
from tests.oracle.test_merge import shuffled_copies

Checkpoint = Callable[..., Path]
Sampler = Callable[..., Path]
BLIND: dict[str, Any] = {
    "group_by": "weights",
    "cluster": "k-means",
    "align": "weight",
    "combine": "mean",
}
PRESETS: dict[str, tuple[dict[str, Any], tuple[str, str, str, str]]] = {
    "hc-smoe": ({}, ("mean-outputs", "hierarchical", "none", "frequency")),
    "sub-moe": ({}, ("outputs", "k-means", "none", "frequency")),
    "m-smoe": ({"align": "none"}, ("router-logits", "dominant", "none", "frequency")),
}


def chosen(group_by: str, cluster: str, align: str, combine: str) -> dict[str, Any]:
    return {"group_by": group_by, "cluster": cluster, "align": align, "combine": combine}


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("router", ["keep", "tied"])
def test_presets_are_compositions(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, preset: str, router: str
) -> None:
    source = checkpoint("qwen3_moe")
    options, axes = PRESETS[preset]
    given: dict[str, Any] = {"experts": 4, "router": router, "calibration": sampled(source)}
    operate("merge", preset, source, tmp_path / "preset", **given, **options)
    operate("merge", "compose", source, tmp_path / "composed", **given, **chosen(*axes))
    one, two = tensors(tmp_path / "preset"), tensors(tmp_path / "composed")
    # Counts and shares of them round differently as weights.
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=1e-6) for key in one)


@pytest.mark.parametrize("align", ["weight", "activation"])
def test_aligned_copies_come_back_whatever_the_other_parts(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, align: str
) -> None:
    source = shuffled_copies(checkpoint("mixtral"), tmp_path / "copies")
    calibration = sampled(source)
    for number, (group_by, cluster, combine) in enumerate(
        [
            ("router-rows", "hierarchical", "mean"),
            ("weights", "dominant", "frequency"),
            ("router-logits", "ream", "saliency"),
            ("outputs", "ream", "least-squares"),
        ]
    ):
        output = tmp_path / str(number)
        given = {"experts": 4, "sample": 600, **chosen(group_by, cluster, align, combine)}
        if number or align == "activation":
            given["calibration"] = calibration
        operate("merge", "compose", source, output, **given)
        assert drift(source, output) < 1e-3


def test_every_combination_plans_and_says_what_text_it_needs(checkpoint: Checkpoint) -> None:
    model = Model.open(checkpoint("qwen3_moe"))
    needs: dict[str, int] = {}
    for axes in product(compose.BASES, compose.CLUSTERS, compose.ALIGNS, compose.COMBINES):
        draft = compose.plan([model], compose.Options(experts=4, **chosen(*axes)))
        sampled = axes[2] == "activation" or axes[3] == "least-squares"
        assert bool(draft.sample) == sampled
        assert draft.data is not None
        needs[draft.data] = needs.get(draft.data, 0) + 1
        if draft.data == "none":
            assert axes[0] in ("router-rows", "weights")
            assert axes[3] == "mean"
    assert needs == {"none": 8, "routed": 136, "all-expert": 96}


def test_without_text(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate("merge", "compose", source, tmp_path / "out", experts=4, **BLIND)
    stock(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["statistics"] is None
    text = tmp_path / "text.txt"
    text.write_text("some text " * 500)
    with pytest.raises(UsageError, match="uses no statistics"):
        operate("merge", "compose", source, tmp_path / "x", experts=4, data=(text,), **BLIND)
    options = {**BLIND, "reconstruct": True, "sample": 300}
    operate("merge", "compose", source, tmp_path / "new", experts=4, **options)
    assert json.loads((tmp_path / "new" / "report.json").read_text())["statistics"] is not None


def test_options_of_parts_that_were_not_chosen(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    for wrong, part in (
        ({"linkage": "ward"}, "--cluster hierarchical"),
        ({"group_size": 4, "cluster": "k-means"}, "--cluster ream"),
        ({"merge_ridge": 0.1}, "--combine least-squares"),
    ):
        with pytest.raises(UsageError, match=part):
            operate("merge", "compose", source, tmp_path / "x", experts=4, **wrong)
    with pytest.raises(InputError, match="do not hold"):
        operate("merge", "compose", source, tmp_path / "x", experts=2, group_size=3)
    with pytest.raises(InputError, match="have biases"):
        operate(
            "merge", "compose", checkpoint("gpt_oss"), tmp_path / "x", experts=4, align="activation"
        )
