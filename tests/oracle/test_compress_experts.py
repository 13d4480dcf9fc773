"""Mixtures with shared parts: model code against the stock class with the matrices these stand for."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.checkpoint.reader import TensorReader, open_checkpoint
from moesurg.surgery.errors import InputError, Interrupted, UsageError
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.oracle.helpers import custom, operate, rewrite, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
METHODS: dict[str, dict[str, Any]] = {
    "molae": {"group": 2, "down": True},
    "d2-moe": {},
    "resmoe": {},
    "mobe": {"steps": 2, "inner": 8},
    "slbf": {"steps": 2, "inner": 10},
}
RATIO = 0.25


def experts_of(folder: Path) -> dict[tuple[int, int, str], torch.Tensor]:
    """Every expert's matrices by layer, expert and projection."""
    model = Model.open(folder)
    found = {}
    with TensorReader(model.checkpoint) as reader:
        for layer in model.moe_layers:
            assert layer.experts is not None
            for expert in range(layer.experts.count):
                for part in ("gate", "up", "down"):
                    region = layer.experts.region(expert, part)
                    found[layer.index, expert, part] = reader.read(region).float()
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_shared_form_computes_what_the_dense_form_does(
    method: str, family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    sizes = {}
    for form in ("shared", "dense"):
        result = operate(
            "compress", method, source, tmp_path / form, ratio=RATIO, form=form, **METHODS[method]
        )
        assert result["tier"] == {"shared": "custom", "dense": "stock"}[form]
        sizes[form] = result["bytes"]
    one, other, ids = custom(tmp_path / "shared"), stock(tmp_path / "dense"), token_ids(source)
    with torch.no_grad():
        first, second = one(input_ids=ids).logits, other(input_ids=ids).logits
        assert float((first - second).abs().max()) < 1e-4
        assert float((second - stock(source)(input_ids=ids).logits).abs().max()) > 1e-3
        texts = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (one, other)]
    assert torch.equal(*texts)
    operate("convert", "expand", tmp_path / "shared", tmp_path / "whole")
    whole, dense = experts_of(tmp_path / "whole"), experts_of(tmp_path / "dense")
    assert all(float((whole[key] - matrix).abs().max()) < 1e-5 for key, matrix in dense.items())
    # It is really smaller, by what was asked of the experts.
    held = sum(tensor.numel() for tensor in experts_of(source).values())
    element = 4
    assert sizes["dense"] == sum(i.nbytes for i in open_checkpoint(source).tensors.values())
    assert sizes["dense"] - sizes["shared"] >= RATIO * held * element


@pytest.mark.parametrize("method", ["molae", "d2-moe"])
def test_half_precision_differs_from_the_dense_form_by_rounding_only(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    for form in ("shared", "dense"):
        operate(
            "compress", method, source, tmp_path / form, ratio=RATIO, form=form, **METHODS[method]
        )
    ids = token_ids(source)
    with torch.no_grad():
        plain, dense, shared = (
            model(input_ids=ids).logits
            for model in (stock(source), stock(tmp_path / "dense"), custom(tmp_path / "shared"))
        )
    rounding = float((shared - dense).norm() / dense.norm())
    assert rounding < 0.05 < float((dense - plain).norm() / plain.norm())


def test_molae_leaves_down_as_it_is_and_text_changes_the_rest(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, text = checkpoint("qwen3_moe", tokenizer=True), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 40)
    for name, data in (("free", ()), ("seen", (text,))):
        operate(
            "compress",
            "molae",
            source,
            tmp_path / name,
            ratio=0.2,
            form="dense",
            group=2,
            data=data,
        )
    before, free, seen = (
        experts_of(folder) for folder in (source, tmp_path / "free", tmp_path / "seen")
    )
    for key, matrix in before.items():
        if key[2] == "down":
            assert torch.equal(matrix, free[key])
            assert torch.equal(matrix, seen[key])
    assert any(not torch.equal(free[key], seen[key]) for key in before)
    # The free one is nearest in the Frobenius norm.
    distance = [
        sum(float((found[key] - before[key]).square().sum()) for key in before)
        for found in (free, seen)
    ]
    assert distance[0] < distance[1]
    report = json.loads((tmp_path / "seen" / "report.json").read_text())
    assert report["statistics"]["domains"] == ["text"]


def test_equal_experts_and_shuffled_neurons_are_exact(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """D2-MoE on equal experts; ResMoE also where they differ by the order of their neurons."""
    source = checkpoint("qwen3_moe")
    before, change = tensors(source), {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in before.items():
        if ".experts." not in name:
            continue
        place, _, rest = name.partition(".experts.")
        expert, _, leaf = rest.partition(".")
        first = before[f"{place}.experts.0.{leaf}"]
        width = before[f"{place}.experts.0.down_proj.weight"].shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(int(expert)))
        change[name] = first[:, order] if leaf.startswith("down") else first[order]
        assert change[name].shape == tensor.shape
    assert change
    del generator
    shuffled = rewrite(
        source, tmp_path / "shuffled", {k: v.contiguous() for k, v in change.items()}
    )
    operate("compress", "resmoe", shuffled, tmp_path / "aligned", ratio=0.5)
    operate("compress", "d2-moe", shuffled, tmp_path / "not", ratio=0.5)
    ids = token_ids(source)
    with torch.no_grad():
        wanted, exact, other = (
            model(input_ids=ids).logits
            for model in (stock(shuffled), custom(tmp_path / "aligned"), custom(tmp_path / "not"))
        )
    assert float((wanted - exact).abs().max()) < 1e-4
    assert float((wanted - other).abs().max()) > 1e-3


def test_what_cannot_be_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = checkpoint("qwen3_moe"), tmp_path / "out"
    with pytest.raises(UsageError, match="--group 3"):
        operate("compress", "molae", source, out, ratio=0.2, group=3)
    with pytest.raises(InputError, match="no rank"):
        operate("compress", "molae", source, out, ratio=0.9)
    with pytest.raises(InputError, match="no rank"):
        operate("compress", "d2-moe", source, out, ratio=0.9)
    with pytest.raises(InputError, match="no experts"):
        operate("compress", "d2-moe", checkpoint("llama"), out, ratio=0.2)
    with pytest.raises(UsageError, match="--ratio"):
        operate("compress", "resmoe", source, out, ratio=1.0)
    assert not out.exists()


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_families_with_other_blocks_take_the_dense_form_only(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    with pytest.raises(InputError, match="without biases"):
        operate("compress", "d2-moe", source, tmp_path / "out", ratio=0.2)
    operate("compress", "d2-moe", source, tmp_path / "out", ratio=0.2, form="dense")
    stock(tmp_path / "out")


class Counting(Silent):
    """Counts the steps of the last stage; can be told to interrupt the run at one of them."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at, self.total, self.done = stop_at, 0, 0

    def stage(self, name: str, total: int) -> None:
        self.total, self.done = total, 0

    def advance(self, count: int = 1) -> None:
        self.done += count
        if 0 < self.stop_at <= self.done:
            self.stop_at = 0
            os.kill(os.getpid(), signal.SIGINT)


def fit(source: Path, output: Path, progress: Counting, **fields: Any) -> None:
    options = {"ratio": RATIO, "steps": 6, "inner": 8}
    run(Request("compress", "mobe", (str(source),), output, options, **fields), progress)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fit_shows_its_steps(workers: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    progress = Counting()
    fit(checkpoint("qwen3_moe"), tmp_path / "out", progress, workers=workers)
    steps = 6 * 2 * 2  # of gate and up, in two layers
    assert progress.done == progress.total
    assert progress.total > steps


def test_a_fit_stops_between_its_steps_and_begins_again(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    fit(source, tmp_path / "whole", Counting(), workers=1)
    with pytest.raises(Interrupted):
        fit(source, tmp_path / "out", Counting(stop_at=9), workers=1)
    assert not (tmp_path / "out").exists()
    progress = Counting()
    fit(source, tmp_path / "out", progress, workers=1, resume=True)
    assert progress.done == progress.total
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
