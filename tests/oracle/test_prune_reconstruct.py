"""Pruned layers that are solved for again, and grafts, measured with the stock modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods.prune.graft import exchange
from tests.faults.harness import digest
from tests.oracle.helpers import drift, operate, rewrite, stock, tensors, units
from tests.oracle.test_reconstruct import assert_as_told, block, rows_of

Checkpoint = Callable[..., Path]
Sampler = Callable[..., Path]


def prune(method: str, source: Path, output: Path, calibration: Path, **options: Any) -> None:
    given = {"experts": 4, "sample": 600, "calibration": calibration, **options}
    operate("prune", method, source, output, **given)


@pytest.mark.parametrize("method", ["reap", "hope", "naee", "random", "aimer", "weighted-ean"])
def test_the_stock_layer_is_as_close_as_the_report_says(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, method: str
) -> None:
    source = checkpoint("qwen3_moe")
    calibration = sampled(source)
    prune(method, source, tmp_path / "new", calibration, reconstruct=True)
    blind = {} if method in ("random", "aimer") else {"calibration": calibration}
    operate("prune", method, source, tmp_path / "plain", experts=4, **blind)
    assert_as_told(source, tmp_path / "plain", tmp_path / "new", calibration)


def test_what_sees_no_text_asks_for_some_only_where_it_solves(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    operate("prune", "random", source, tmp_path / "plain", experts=4)
    operate("prune", "random", source, tmp_path / "new", experts=4, reconstruct=True)
    report = {
        name: json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "new")
    }
    assert report["plain"]["statistics"] is None
    assert report["new"]["statistics"] is not None
    assert report["plain"]["decisions"] == report["new"]["decisions"]


@pytest.mark.parametrize("method", ["reap", "graft"])
def test_with_nothing_dropped_the_function_comes_back(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, method: str
) -> None:
    source = checkpoint("qwen3_moe")
    extra = {"reconstruct": True} if method == "reap" else {}
    prune(method, source, tmp_path / "same", sampled(source), experts=8, **extra)
    report = json.loads((tmp_path / "same" / "report.json").read_text())
    assert report["exactness"]["kind"] == "exact"
    assert drift(source, tmp_path / "same") < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "olmoe", "granitemoe"])
def test_families_with_groups_layouts_and_scalings(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, family: str
) -> None:
    source = checkpoint(family)
    prune("graft", source, tmp_path / "out", sampled(source), sweeps=8)
    stock(tmp_path / "out")
    told = [
        unit["reconstruction"] for unit in units(tmp_path / "out").values() if unit.get("experts")
    ]
    assert told
    assert all(layer["error_after"] < layer["error_before"] for layer in told)


def test_experts_with_biases_are_refused_before_anything_is_read(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="experts of gpt_oss have biases"):
        operate("prune", "graft", checkpoint("gpt_oss"), tmp_path / "out", experts=4)


@pytest.mark.parametrize("command", ["prune", "merge"])
@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_a_selection_bias_is_part_of_the_routing(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path, family: str, command: str
) -> None:
    """Error before and after are those of the stock layers, whose routers select with the bias."""
    source = checkpoint(family)
    calibration = sampled(source)
    method = "reap" if command == "prune" else "hc-smoe"
    options: dict[str, Any] = {"experts": 4, "sample": 600, "calibration": calibration}
    if command == "merge" and family == "deepseek_v3":
        options["router"] = "tied"
    operate(command, method, source, tmp_path / "new", **options, reconstruct=True)
    operate(command, method, source, tmp_path / "plain", **{**options, "sample": 4096})
    original, plain, new = stock(source), stock(tmp_path / "plain"), stock(tmp_path / "new")
    found = units(tmp_path / "new")
    told = {key: unit["reconstruction"] for key, unit in found.items() if "reconstruction" in unit}
    assert told
    for key, numbers in told.items():
        layer = int(key.split(".")[1])
        rows = rows_of(calibration, layer)
        target = block(original, layer, rows)
        # Shared experts are part of the stock layer; the report is about the routed ones.
        shared = original.model.layers[layer].mlp.shared_experts
        routed = target if shared is None else target - shared(rows).detach().double()
        for model, name in ((plain, "error_before"), (new, "error_after")):
            error = float((block(model, layer, rows) - target).norm() / routed.norm())
            assert error == pytest.approx(numbers[name], rel=1e-4)


def test_no_grafts_are_reap_with_reconstruction(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    prune("graft", source, tmp_path / "graft", sampled(source), fraction=0.0)
    prune("reap", source, tmp_path / "reap", sampled(source), reconstruct=True)
    one, two = tensors(tmp_path / "graft"), tensors(tmp_path / "reap")
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_dead_neurons_are_where_the_grafts_go(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path
) -> None:
    """Half of each expert's neurons is zero: these places, and no other, take the dropped experts' living ones."""
    source = checkpoint("qwen3_moe")
    change = {}
    for name, tensor in tensors(source).items():
        if "experts" in name and "down_proj" in name:
            change[name] = tensor.clone()
            change[name][:, ::2] = 0
        elif "experts" in name:
            change[name] = tensor.clone()
            change[name][::2] = 0
    lame = rewrite(source, tmp_path / "lame", change)
    calibration = sampled(lame)
    prune("graft", lame, tmp_path / "out", calibration)
    prune("graft", lame, tmp_path / "none", calibration, fraction=0.0)
    found, plain = tensors(tmp_path / "out"), tensors(tmp_path / "none")
    living = tensors(lame)
    for layer in range(3):
        told = units(tmp_path / "out")[f"layer.{layer}.experts"]
        width = 2 * len(living["model.layers.0.mlp.experts.0.gate_proj.weight"][1::2])
        assert all(0 < count <= width // 2 for count in told["grafted"])
        rows = {
            tuple(row.tolist())
            for expert in range(8)
            if expert not in told["experts"]
            for row in living[f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"][1::2]
        }
        for slot, count in enumerate(told["grafted"]):
            key = f"model.layers.{layer}.mlp.experts.{slot}.gate_proj.weight"
            changed = (found[key] != plain[key]).any(dim=1).nonzero().flatten()
            assert len(changed) == count
            assert not changed.remainder(2).any()
            assert all(tuple(found[key][row].tolist()) in rows for row in changed)
        solved = units(tmp_path / "none")[f"layer.{layer}.experts"]["reconstruction"]
        assert told["reconstruction"]["error_after"] < solved["error_after"]


def test_exchanges_stop_where_the_own_neuron_is_worth_as_much() -> None:
    own = torch.tensor([5.0, 1.0, 3.0, 2.0])
    offered = torch.tensor([[0.5, 4.0, 0.0, 2.0], [4.0, 0.0, 0.1, 9.0]])
    assert exchange(own, offered, 4) == [(1, 1, 3), (3, 0, 1), (2, 1, 0)]
    assert exchange(own, offered, 2) == [(1, 1, 3), (3, 0, 1)]
    assert exchange(own, torch.zeros(2, 4), 4) == []


def test_bytes_are_the_same_again_and_fractions_are_shares(
    checkpoint: Checkpoint, sampled: Sampler, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    for name in ("one", "two"):
        prune("graft", source, tmp_path / name, sampled(source))
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    with pytest.raises(UsageError, match="--fraction should be from 0 to 1"):
        prune("graft", source, tmp_path / "three", sampled(source), fraction=1.5)
