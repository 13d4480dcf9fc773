"""Layers of parts: model code against the stock class with the matrices these stand for, and honest sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.checkpoint.reader import open_checkpoint
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.oracle.helpers import custom, operate, peft, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
RUNS: dict[str, dict[str, Any]] = {
    "lost": {"exact": 0.1},
    "lost-factors": {"exact": 0.1, "lowrank": "factors", "ratio": 0.4},
    "mc-smoe": {},
    "dct": {"side": "output"},
    "dct-input": {"side": "input"},
    "residual": {"rank": 4, "group": 16},
    "residual-ternary": {"rank": 3, "bits": "ternary", "group": 24},
    "residual-int8": {"rank": 0, "bits": "int8", "group": 64},
}


def linear_bytes(folder: Path) -> int:
    """Bytes of everything below a projection, biases aside."""
    return sum(
        info.nbytes
        for name, info in open_checkpoint(folder).tensors.items()
        if "_proj." in name and not name.endswith(".bias")
    )


@pytest.mark.parametrize("run", RUNS)
def test_the_parts_compute_what_the_dense_form_does(
    run: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    method = (
        run.replace("-factors", "")
        .replace("-input", "")
        .replace("-ternary", "")
        .replace("-int8", "")
    )
    source = checkpoint("qwen2")
    options = {"ratio": 0.25, **RUNS[run]}
    for form in ("parts", "dense"):
        operate("compress", method, source, tmp_path / form, form=form, **options)
    one, other, ids = custom(tmp_path / "parts"), stock(tmp_path / "dense"), token_ids(source)
    with torch.no_grad():
        first, second = one(input_ids=ids).logits, other(input_ids=ids).logits
        assert float((first - second).abs().max()) < 2e-4
        assert float((second - stock(source)(input_ids=ids).logits).abs().max()) > 2e-4
        texts = [model.generate(ids, max_new_tokens=5, do_sample=False) for model in (one, other)]
    assert torch.equal(*texts)
    operate("convert", "expand", tmp_path / "parts", tmp_path / "whole")
    for name, tensor in tensors(tmp_path / "whole").items():
        lost = (tensor - tensors(tmp_path / "dense")[name]).abs().max()
        assert float(lost) < 1e-5, name
    assert linear_bytes(tmp_path / "parts") <= (1 - options["ratio"]) * linear_bytes(source)
    assert linear_bytes(tmp_path / "dense") == linear_bytes(source)


def test_a_mixture_keeps_what_is_no_target(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate("compress", "dct", source, tmp_path / "out", ratio=0.2, form="dense", targets="gate")
    stock(tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("gate_proj" in name for name in changed)


def test_a_residual_of_higher_rank_or_seen_text_is_better_where_it_counts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, errors = checkpoint("llama", tokenizer=True), []
    for rank in (0, 2, 8):
        out = tmp_path / str(rank)
        options: dict[str, Any] = {"bits": "ternary", "group": 16, "targets": "up", "form": "dense"}
        operate("compress", "residual", source, out, ratio=0.2, rank=rank, **options)
        report = json.loads((out / "report.json").read_text())
        metrics = [entry for entry in report["units"].values() if "rounding" in entry]
        errors.append(max(entry["error"] for entry in metrics))
        assert all(entry["error"] <= entry["rounding"] + 1e-9 for entry in metrics)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[2]
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 40)
    operate(
        "compress",
        "residual",
        source,
        tmp_path / "seen",
        ratio=0.2,
        rank=8,
        data=(text,),
        **options,
    )
    blind, seen = tensors(tmp_path / "8"), tensors(tmp_path / "seen")
    assert any(not torch.equal(blind[name], seen[name]) for name in blind)


@pytest.mark.parametrize("bits", ["int4", "ternary"])
def test_a_residual_is_an_adapter_that_peft_loads(
    bits: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, options = checkpoint("qwen2"), {"ratio": 0.2, "rank": 4, "group": 16, "bits": bits}
    result = operate(
        "compress",
        "residual",
        source,
        tmp_path / "out",
        form="lora",
        max_shard_bytes=60_000,
        **options,
    )
    assert result["tier"] == "stock"
    # The model can lie in several files, an adapter cannot.
    assert len(list((tmp_path / "out" / "base").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    operate("compress", "residual", source, tmp_path / "dense", form="dense", **options)
    base, adapter = tmp_path / "out" / "base", tmp_path / "out" / "adapter"
    ids = token_ids(source)
    with torch.no_grad():
        wanted = stock(tmp_path / "dense")(input_ids=ids).logits
        rounded = stock(base)(input_ids=ids).logits
        found = peft(base, adapter)(input_ids=ids).logits
    assert float((found - wanted).abs().max()) < 1e-4
    assert float((rounded - wanted).abs().max()) > 1e-2
    # Every group of a rounded matrix has as many values as its bits have.
    matrix = tensors(base)["model.layers.0.mlp.up_proj.weight"]
    values = [len(group.unique()) for row in matrix for group in row.split(16)]
    assert max(values) <= {"int4": 15, "ternary": 3}[bits]
    checked = verify(str(tmp_path / "out"), reference=None, device="cpu", progress=Silent())
    assert "PEFT" in checked["loads"]
    assert checked["not_in_report"] == []
    operate("adapter", "apply", [base, adapter], tmp_path / "applied")
    with torch.no_grad():
        applied = stock(tmp_path / "applied")(input_ids=ids).logits
    assert float((applied - wanted).abs().max()) < 1e-4


def test_an_adapter_is_for_linear_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0.2, "rank": 2, "group": 16, "form": "lora"}
    with pytest.raises(InputError, match="is an expert's matrix"):
        operate("compress", "residual", checkpoint("qwen3_moe"), tmp_path / "out", **options)
    operate(
        "compress",
        "residual",
        checkpoint("qwen3_moe"),
        tmp_path / "out",
        targets="attention",
        **options,
    )
    peft(tmp_path / "out" / "base", tmp_path / "out" / "adapter")
    with pytest.raises(InputError, match="rank 0"):
        operate(
            "compress", "residual", checkpoint("llama"), tmp_path / "no", **{**options, "rank": 0}
        )


def test_what_cannot_be_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    with pytest.raises(InputError, match="takes more than 10%"):
        operate("compress", "residual", source, out, ratio=0.9, bits="int8")
    with pytest.raises(UsageError, match="--exact"):
        operate("compress", "lost", source, out, ratio=0.2, exact=1.0)
    with pytest.raises(InputError, match="fewer bytes"):
        operate("compress", "mc-smoe", source, out, ratio=0.95, exact=0.5)
    assert not out.exists()
