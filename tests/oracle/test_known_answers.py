"""Answers that are known beforehand, for every family: masks, copies in another order, weights that choose, bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.collect import collect
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.linalg.permutation import align
from moesurg.surgery.linalg.svd import leading_left
from moesurg.surgery.methods.experts._groups import Grouping, from_members
from tests.oracle.helpers import custom, drift, operate, rewrite, stock, tensors, token_ids
from tests.oracle.test_forms import MIXTURES
from tests.oracle.test_forward import sequences

Checkpoint = Callable[..., Path]


@contextmanager
def never_chosen(model: Any, source: Path, kept: dict[str, Any]) -> Iterator[None]:
    """A stock model whose routers see minus infinity for some experts, and no bias that would choose them anyway."""
    linear, hidden = torch.nn.functional.linear, {}
    for layer in Model.open(source).moe_layers:
        experts = layer.experts
        assert experts is not None
        dropped = [e for e in range(8) if e not in kept[str(layer.index)]["kept"]]
        block = model.model.layers[layer.index]
        router = block.get_submodule(experts.stock.modules[0])
        hidden[id(router.weight)] = dropped
        if experts.stock.correction:
            place, _, leaf = experts.stock.correction.rpartition(".")
            getattr(block.get_submodule(place), leaf).data.view(-1)[dropped] = float("-inf")
    seen = set()

    def masked(given: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = linear(given, weight, *rest)
        dropped = hidden.get(id(weight))
        if dropped is None:
            return logits
        seen.add(id(weight))
        columns = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(dropped), True)
        return logits.masked_fill(columns, float("-inf"))

    with mock.patch("torch.nn.functional.linear", masked):
        yield
    assert seen == set(hidden)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_pruned_model_is_the_original_with_the_dropped_experts_masked(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Before selection, whatever the router makes of its logits; with a seed that differs from other tests'."""
    source = checkpoint(family, seed=1)
    operate("prune", "random", source, tmp_path / "out", experts=4, seed=2)
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["decisions"]
    ids, model = token_ids(source), stock(source)
    with torch.no_grad():
        original = model(input_ids=ids).logits
        with never_chosen(model, source, kept):
            wanted = model(input_ids=ids).logits
        pruned = (custom if family == "jetmoe" else stock)(tmp_path / "out")
        found = pruned(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert float((original - wanted).abs().max()) > 1e-2


def copies(source: Path, target: Path) -> Path:
    """The model with every expert of a layer its expert 0, neurons in another order each time."""
    model, change = Model.open(source), tensors(source)
    generator = torch.Generator().manual_seed(3)
    with TensorReader(model.checkpoint) as reader:
        for layer in model.moe_layers:
            experts = layer.experts
            assert experts is not None
            first = {part: reader.read(region) for part, region in experts.regions(0).items()}
            for expert in range(1, experts.count):
                order = torch.randperm(experts.width, generator=generator)
                for part, region in experts.regions(expert).items():
                    axis = 1 if part == "down" else 0
                    value = first[part]
                    if part != "down_bias":
                        value = value.index_select(axis, order)
                    flat = change[region.tensor].contiguous().view(-1)
                    flat.as_strided(region.shape, region.strides, region.offset).copy_(value)
                    change[region.tensor] = flat.view(change[region.tensor].shape)
    return rewrite(source, target, change)


@pytest.mark.parametrize("family", MIXTURES)
def test_copies_in_another_order_merge_to_the_original(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With aligned neurons and a tied router, behind every kind of router; without alignment they do not.

    Every merged expert is an order of the one expert. (test_forms.py holds mapped routers against tied ones.)
    """
    source = copies(checkpoint(family), tmp_path / "copies")
    options = {"experts": 3, "tokens": 128}
    operate("merge", "m-smoe", source, tmp_path / "tied", router="tied", **options)
    assert drift(source, tmp_path / "tied") < 1e-3
    if family in ("mixtral", "llama4_text"):
        out = tmp_path / "plain"
        operate("merge", "m-smoe", source, out, router="tied", align="none", **options)
        assert drift(source, out) > 1e-2
    before, after = Model.open(source), Model.open(tmp_path / "tied")
    with TensorReader(before.checkpoint) as old, TensorReader(after.checkpoint) as new:
        for one, other in zip(before.moe_layers, after.moe_layers, strict=True):
            assert one.experts is not None
            assert other.experts is not None
            rows = old.read(one.experts.region(0, "gate")).sort(dim=0)[0]
            for expert in range(8):
                merged = new.read(other.experts.region(expert, "gate")).sort(dim=0)[0]
                torch.testing.assert_close(merged, rows, atol=1e-6, rtol=1e-6)


def test_alignment_never_costs_more_than_leaving_neurons_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, other = (
            tuple(torch.randn(*shape, generator=generator) for shape in ((7, 5), (7, 5), (5, 7)))
            for _ in range(2)
        )
        found = align(one, other)  # type: ignore[arg-type]
        assert found.after <= found.before
        moved = (other[0][found.order_F], other[1][found.order_F], other[2][:, found.order_F])
        distances = [
            sum(float(((a - b) ** 2).sum()) for a, b in zip(one, side, strict=True))
            for side in (other, moved)
        ]
        assert distances[1] <= distances[0] + 1e-4


def merged_by(
    grouping: Grouping, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    """A merge by groups that are given instead of found."""
    from moesurg.surgery.methods.experts import m_smoe

    decided = {str(layer.index): grouping.to_json() for layer in Model.open(source).moe_layers}
    monkeypatch.setattr(m_smoe, "decide", lambda *_: decided)
    operate(
        "merge", "m-smoe", source, output, experts=len(grouping.groups), align="none", tokens=64
    )
    return tensors(output)


def name(expert: int, leaf: str) -> str:
    return f"model.layers.1.mlp.experts.{expert}.{leaf}_proj.weight"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_one_takes_the_member_as_it_is(
    dtype: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen3_moe", dtype=dtype)
    usage = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    members = {number: [2 * number, 2 * number + 1] for number in range(4)}
    grouping = from_members(members, {number: 2 * number for number in range(4)}, usage)
    before = tensors(source)
    after = merged_by(grouping, source, tmp_path / "out", monkeypatch)
    for slot in range(4):
        for leaf in ("gate", "up", "down"):
            assert torch.equal(after[name(slot, leaf)], before[name(2 * slot, leaf)])


def test_an_average_is_rounded_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of bfloat16 experts in full precision, then one cast; adding up in bfloat16 gives another."""
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    usage = [3.0, 2.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    grouping = from_members({0: [0, 1, 2], 1: [3, 4, 5, 6, 7]}, {0: 0, 1: 3}, usage)
    before = tensors(source)
    after = merged_by(grouping, source, tmp_path / "out", monkeypatch)
    stepwise = 0
    for slot, (group, weights) in enumerate(zip(grouping.groups, grouping.weights, strict=True)):
        for leaf in ("gate", "up", "down"):
            matrices = [before[name(expert, leaf)] for expert in group]
            mean = sum(w * m.double() for w, m in zip(weights, matrices, strict=True))
            assert isinstance(mean, torch.Tensor)
            # As near as bfloat16 gets, however ties fall.
            nearest = (mean.bfloat16().double() - mean).abs()
            found = (after[name(slot, leaf)].double() - mean).abs()
            assert bool((found <= nearest + 1e-12).all())
            rough = torch.zeros_like(matrices[0])
            for weight, matrix in zip(weights, matrices, strict=True):
                rough = rough + (weight * matrix).bfloat16()
            stepwise += int((rough != mean.bfloat16()).sum())
    assert stepwise > 0


def test_the_shared_subspace_of_two_equal_matrices_is_their_own() -> None:
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = torch.cat([matrix, matrix], dim=1)
    basis_OR = leading_left(both @ both.T, 4)
    torch.testing.assert_close(basis_OR @ (basis_OR.T @ matrix), matrix)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_pairs_are_selected_as_often_as_their_experts_allow(
    family: str, checkpoint: Checkpoint
) -> None:
    """Between the bounds that the counts of two experts set (Frechet), and k (k - 1) ordered pairs a token."""
    model, text = Model.open(checkpoint(family)), sequences()
    with TensorReader(model.checkpoint) as reader:
        found = collect(model, reader, text, mode="routed").tensors
    for layer in model.moe_layers:
        prefix = f"layers.{layer.index}.{text.domains[0]}."
        count_E, pair_EE = found[prefix + "count_E"], found[prefix + "pair_count_EE"]
        np.testing.assert_array_equal(np.diagonal(pair_EE), count_E)
        smaller_EE = np.minimum(count_E[:, None], count_E[None, :])
        least_EE = np.maximum(count_E[:, None] + count_E[None, :] - text.total, 0)
        assert (pair_EE <= smaller_EE).all()
        assert (pair_EE >= least_EE).all()
        assert pair_EE.sum() - count_E.sum() == text.total * 2  # of two experts a token


@pytest.mark.parametrize(
    "wrong",
    [("hc-smoe", "--linkage", "hirarchical"), ("hc-smoe", "--basis", "outputs")],
)
def test_a_misspelt_choice_is_an_error_and_no_other_method(
    wrong: tuple[str, str, str],
    checkpoint: Checkpoint,
    call_cli: Callable[..., Any],
    tmp_path: Path,
) -> None:
    method, option, value = wrong
    words = ("merge", checkpoint("mixtral"), "--method", method, "--experts", 4, option, value)
    shown = call_cli(*words, "-o", tmp_path / "out")
    assert (shown.code, value in shown.err) == (2, True)
    assert not (tmp_path / "out").exists()


def test_what_is_not_merged_keeps_its_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen2_moe", dtype="bfloat16")
    operate("merge", "hc-smoe", source, tmp_path / "out", experts=3, tokens=128)
    before, after = tensors(source), tensors(tmp_path / "out")
    untouched = [key for key in before if "mlp.experts." not in key and "mlp.gate." not in key]
    assert len(untouched) > 20
    assert all(torch.equal(before[key], after[key]) for key in untouched)
