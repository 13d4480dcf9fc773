"""Splitting by what neurons do on a text: CMoE and co-activation, their fitted routers, and laws every split obeys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from tests.faults.harness import digest
from tests.oracle.helpers import drift, operate, rewrite, stock, tensors

Checkpoint = Callable[..., Path]
WAYS = ["cmoe", "coactivation"]


@pytest.fixture
def text(tmp_path: Path) -> tuple[Path, ...]:
    words = ("the heart of a tree ", "def f(x): return x\n", "Der Rat der Stadt ")
    for number, word in enumerate(words):
        (tmp_path / f"text-{number}.txt").write_text(word * 60)
    return tuple(tmp_path / f"text-{number}.txt" for number in range(3))


def neurons_of(dense: dict[str, torch.Tensor], layer: int) -> tuple[torch.Tensor, ...]:
    name = f"model.layers.{layer}.mlp."
    gate, up, down = (dense[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return gate, up, down


def parts_of(output: Path, layer: int, gate: torch.Tensor, experts: int) -> list[list[int]]:
    moe, found = tensors(output), []
    for number in range(experts):
        names = (
            f"model.layers.{layer}.block_sparse_moe.experts.{number}.w1.weight",
            f"model.layers.{layer}.mlp.experts.{number}.gate_proj.weight",
        )
        stored = next(moe[name] for name in names if name in moe)
        found.append((stored[:, None] == gate[None]).all(dim=2).nonzero()[:, 1].tolist())
    return found


def inputs_of(folder: Path, files: tuple[Path, ...], layer: int) -> torch.Tensor:
    """What a layer's feed-forward is given in the stock model on every token, domain after domain: [N, D]."""
    from moesurg.surgery.calibration.corpus import read_corpus
    from moesurg.surgery.calibration.sequences import tokenise

    sequences = tokenise(read_corpus(files), folder, tokens=600, seq_len=64)
    model = stock(folder)
    seen: list[torch.Tensor] = []
    model.model.layers[layer].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0][0])
    )
    with torch.no_grad():
        for ids in sequences.ids:
            model(input_ids=torch.from_numpy(ids)[None])
    return torch.cat(seen)


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(("family", "shared"), [("llama", 0), ("llama", 8), ("qwen3", 0)])
def test_all_parts_together_are_the_dense_function(
    checkpoint: Checkpoint, tmp_path: Path, by: str, family: str, shared: int
) -> None:
    """With a fitted router too, which is zero where all experts are wanted."""
    source, output, experts = checkpoint(family), tmp_path / "moe", 5 if shared else 3
    options: dict[str, Any] = {"by": by, "shared_neurons": shared, "top_k": experts}
    result = operate("upcycle", "split", source, output, experts=experts, **options)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    uniform = operate(
        "upcycle",
        "split",
        source,
        tmp_path / "uniform",
        experts=3,
        top_k=3,
        by=by,
        router="uniform",
    )
    assert uniform["exactness"]["kind"] == "exact"
    assert drift(source, tmp_path / "uniform") < 1e-4


@pytest.mark.parametrize("by", WAYS)
def test_every_neuron_is_in_one_expert_and_shared_ones_are_the_most_active(
    checkpoint: Checkpoint, tmp_path: Path, text: tuple[Path, ...], by: str
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    operate(
        "upcycle", "split", source, output, experts=5, data=text, by=by, shared_neurons=8, active=6
    )
    gate, up, down = neurons_of(tensors(source), 1)
    parts = parts_of(output, 1, gate, 5)
    kept = tensors(output)["model.layers.1.mlp.shared_expert.gate_proj.weight"]
    always = (kept[:, None] == gate[None]).all(dim=2).nonzero()[:, 1].tolist()
    assert sorted([*always, *(neuron for part in parts for neuron in part)]) == list(range(48))
    x = inputs_of(source, text, 1)
    if by == "cmoe":
        x, gate, up = (rows / rows.norm(dim=1, keepdim=True) for rows in (x, gate, up))
        strength = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs()
    else:
        strength = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)).abs() * down.norm(dim=0)
    rate = torch.zeros(48).index_add_(0, strength.topk(6).indices.flatten(), torch.ones(6 * len(x)))
    others = [neuron for neuron in range(48) if neuron not in always]
    # Sums in another order may swap neurons that are all but equal on a token.
    assert rate[always].min() >= rate[others].max() - 2


def test_the_analytic_router_is_fitted_and_measured(
    checkpoint: Checkpoint, tmp_path: Path, text: tuple[Path, ...]
) -> None:
    """Recall in the report is that of the stored rows on held-out tokens, counted here from the stock model."""
    source, output = checkpoint("llama"), tmp_path / "moe"
    options: dict[str, Any] = {"by": "cmoe", "top_k": 2, "active": 6, "sharpness": 0.5}
    operate("upcycle", "split", source, output, experts=6, data=text, **options)
    x = inputs_of(source, text, 0)
    report = json.loads((output / "report.json").read_text())
    told = report["units"]["layer.0.split"]
    assert told["tokens"] == len(x) == report["decisions"]["0"]["rows"]
    assert report["statistics"]["mode"] == "means"
    rows = tensors(output)["model.layers.0.block_sparse_moe.gate.weight"]
    gate, up, down = neurons_of(tensors(source), 0)
    parts = parts_of(output, 0, gate, 6)
    active = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    oracle = torch.stack([(active[:, own] @ down[:, own].T).norm(dim=1) for own in parts], dim=1)
    held = torch.arange(len(x)) % 4 == 3
    logits = x @ rows.T
    assert float(logits[~held].square().mean().sqrt()) == pytest.approx(0.5, rel=1e-2)
    ours, best = (
        {(n, e) for n, row in enumerate(scores[held].topk(2).indices.tolist()) for e in row}
        for scores in (logits, oracle)
    )
    assert told["recall_of_oracle"] == pytest.approx(len(ours & best) / len(best), abs=0.02)
    assert told["recall_of_analytic"] > told["recall_by_chance"] + 0.2
    assert not list(output.glob("means.*"))


def test_planted_groups_are_found_and_routed_to(
    checkpoint: Checkpoint, tmp_path: Path, text: tuple[Path, ...]
) -> None:
    """Neurons that answer one of four directions of the inputs, on which tokens differ: each bundle is an expert."""
    source = checkpoint("llama")
    x = inputs_of(source, text, 0)
    generator = torch.Generator().manual_seed(0)
    # Directions in which tokens differ most; a neuron is on where its direction is far above the mean.
    centre = x.mean(dim=0)
    axes = torch.linalg.svd(x - centre, full_matrices=False).Vh[:4]
    axes = axes - (axes @ centre)[:, None] * centre / centre.square().sum()
    bundle = torch.arange(4).repeat_interleave(12)[torch.randperm(48, generator=generator)]
    gate = 20 * axes[bundle] + 0.01 * torch.randn(48, 32, generator=generator)
    up = axes[bundle] * (1 + 0.1 * torch.rand(48, 1, generator=generator))
    down = torch.randn(32, 48, generator=generator)
    down = down / down.norm(dim=0)
    name = "model.layers.0.mlp."
    planted = rewrite(
        source,
        tmp_path / "planted",
        {
            f"{name}gate_proj.weight": gate,
            f"{name}up_proj.weight": up,
            f"{name}down_proj.weight": down,
        },
    )
    for by in WAYS:
        output = tmp_path / by
        options: dict[str, Any] = {
            "by": by,
            "top_k": 1,
            "active": 12,
            "router": "oracle",
            "iterations": 20,
        }
        operate("upcycle", "split", planted, output, experts=4, data=text, **options)
        parts = parts_of(output, 0, gate, 4)
        assert [len(set(bundle[part].tolist())) for part in parts] == [1] * 4, by
        told = json.loads((output / "report.json").read_text())["units"]["layer.0.split"]
        assert told["recall_of_oracle"] > 0.7, by


@pytest.mark.parametrize(("by", "router"), [("random", "oracle"), ("kmeans", "analytic")])
def test_any_division_can_have_a_fitted_router(
    checkpoint: Checkpoint, tmp_path: Path, text: tuple[Path, ...], by: str, router: str
) -> None:
    source = checkpoint("llama")
    operate("upcycle", "split", source, tmp_path / "a", experts=6, by=by)
    operate("upcycle", "split", source, tmp_path / "b", experts=6, by=by, router=router, data=text)
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(3)
    }
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    told = [report["units"][f"layer.{layer}.split"]["recall_of_oracle"] for layer in range(3)]
    assert np.mean(told) > 2 / 6


@pytest.mark.parametrize("by", WAYS)
def test_equal_requests_give_equal_bytes(
    checkpoint: Checkpoint, tmp_path: Path, text: tuple[Path, ...], by: str
) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    for name in ("one", "again"):
        operate("upcycle", "split", source, tmp_path / name, by=by, experts=6, data=text)
    assert digest(tmp_path / "one") == digest(tmp_path / "again")


def test_the_sample_is_as_large_as_asked(
    checkpoint: Checkpoint, tmp_path: Path, text: tuple[Path, ...]
) -> None:
    source, output = checkpoint("llama"), tmp_path / "moe"
    operate("upcycle", "split", source, output, experts=4, by="cmoe", rows=99, data=text)
    report = json.loads((output / "report.json").read_text())
    assert [entry["rows"] for entry in report["decisions"].values()] == [99] * 3


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"by": "cmoe", "router": "centroid"}, UsageError, "no centroids"),
        ({"by": "cmoe", "active": 49}, UsageError, "1 to 48 neurons"),
        ({"by": "cmoe", "rows": 0}, UsageError, "--rows"),
        ({"by": "cmoe", "rows": 3}, InputError, "3 tokens to divide"),
        ({"sharpness": 0.0}, UsageError, "--sharpness"),
        ({"by": "cmoe", "ridge": -1.0}, UsageError, "--ridge"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    checkpoint: Checkpoint,
    tmp_path: Path,
    text: tuple[Path, ...],
    options: dict[str, Any],
    error: type[Exception],
    sentence: str,
) -> None:
    given = text if options.get("by") == "cmoe" else ()
    with pytest.raises(error, match=sentence):
        operate(
            "upcycle",
            "split",
            checkpoint("llama"),
            tmp_path / "moe",
            experts=4,
            data=given,
            **options,
        )
