"""AA-SVD against its definition, with inputs recorded from stock transformers before and after."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.linears import linears
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.corpus import read_corpus
from moesurg.surgery.calibration.sequences import tokenise
from moesurg.surgery.errors import InputError, Interrupted, UsageError
from moesurg.surgery.linalg.whitening import truncate_shifted
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.oracle.helpers import custom, operate, stock, tensors, token_ids

Checkpoint = Callable[..., Path]
TEXT = "Pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump! " * 60


def recorded(folder: Path, source: Path, text: Path) -> dict[str, torch.Tensor]:
    """Inputs of every linear layer of a model on the run's sequences, by the weight's name."""
    sequences = tokenise(read_corpus([text]), source, tokens=600, seq_len=64)
    model, found = stock(folder), {}
    rows: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def see(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).double())

        return see

    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for ids in sequences.ids:
            model(input_ids=torch.from_numpy(ids)[None])
    for name, parts in rows.items():
        found[f"{name}.weight"] = torch.cat(parts)
    return found


def test_every_matrix_is_the_best_for_what_its_own_model_gives_it(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, out = checkpoint("llama", tokenizer=True), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options: dict[str, Any] = {"ratio": 0.4, "form": "dense", "damping": 1e-3, "data": (text,)}
    share = 0.7
    operate("compress", "aa-svd", source, out, share=share, **options)
    before, after = recorded(source, source, text), recorded(out, source, text)
    old, new = tensors(source), tensors(out)
    report = json.loads((out / "report.json").read_text())
    shifted = 0
    for linear in linears(Model.open(source)):
        name = linear.region.tensor
        x_TN, y_TN = before[name], after[name]
        rank = report["units"][linear.label]["rank"]
        found = truncate_shifted(
            old[name],
            y_TN.T @ y_TN,
            x_TN.T @ y_TN,
            rank,
            damping=options["damping"],
            share=share,
        )
        wanted = found.product()
        assert float((new[name] - wanted).norm() / wanted.norm()) < 2e-3, name
        shifted += float((x_TN - y_TN).norm()) > 1e-2 * float(x_TN.norm())
        assert report["units"][linear.label]["inputs"] == len(x_TN)
    assert shifted >= len(report["units"]) // 2  # what is tested is there
    # Looking at the shift is worth it: closer final outputs than from the original inputs alone.
    operate("compress", "svd-llm", source, tmp_path / "blind", **options)
    wanted = before["lm_head.weight"]
    distance = [
        float((recorded(folder, source, text)["lm_head.weight"] - wanted).norm())
        for folder in (out, tmp_path / "blind")
    ]
    assert distance[0] < distance[1]


def routed(folder: Path, source: Path, text: Path) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """What every layer's experts are called with on the run's sequences: inputs, and experts by token."""
    sequences = tokenise(read_corpus([text]), source, tokens=600, seq_len=64)
    model = stock(folder)
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def hook(layer: int) -> Any:
        def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, index, *_rest = [*args, *kwargs.values()]
            seen.setdefault(layer, []).append((given.clone(), index.clone()))

        return see

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(hook(layer), with_kwargs=True)
    with torch.no_grad():
        for ids in sequences.ids:
            model(input_ids=torch.from_numpy(ids)[None])
    return {
        layer: tuple(torch.cat(parts) for parts in zip(*calls, strict=True))  # type: ignore[misc]
        for layer, calls in seen.items()
    }


def test_experts_are_the_best_on_the_tokens_that_the_original_router_sends_them(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, out = checkpoint("qwen3_moe", tokenizer=True), tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options: dict[str, Any] = {"damping": 1e-3, "share": 0.7}
    operate("compress", "aa-svd", source, out, ratio=0.4, form="dense", data=(text,), **options)
    before, after = routed(source, source, text), routed(out, source, text)
    old, new = tensors(source), tensors(out)
    units = json.loads((out / "report.json").read_text())["units"]
    moved = rerouted = checked = 0
    for layer, (x_TD, index_TK) in before.items():
        y_TD, other_TK = after[layer]
        rerouted += int((index_TK.sort(1).values != other_TK.sort(1).values).any(1).sum())
        for expert in range(8):
            place = f"model.layers.{layer}.mlp.experts.{expert}."
            token = (index_TK == expert).any(1)
            inputs = dict.fromkeys(("gate", "up"), (x_TD, y_TD))
            inputs["down"] = tuple(  # type: ignore[assignment]
                torch.nn.functional.silu(given[token] @ held[f"{place}gate_proj.weight"].T)
                * (given[token] @ held[f"{place}up_proj.weight"].T)
                for given, held in ((x_TD, old), (y_TD, new))
            )
            for part, (x_TN, y_TN) in inputs.items():
                entry = units[f"layer.{layer}.expert.{expert}.{part}"]
                assert entry["inputs"] == len(x_TN)
                if not len(x_TN):
                    continue
                x, y = x_TN.double(), y_TN.double()
                name = f"{place}{part}_proj.weight"
                wanted = truncate_shifted(old[name], y.T @ y, x.T @ y, entry["rank"], **options)
                lost = (new[name] - wanted.product()).norm() / wanted.product().norm()
                assert float(lost) < 3e-3, name
                moved += float((x - y).norm()) > 1e-2 * float(x.norm())
                checked += 1
    assert rerouted  # what is special about experts is there
    assert moved > checked // 2
    # The same matrices in the pivot form.
    pivot = tmp_path / "pivot"
    operate("compress", "aa-svd", source, pivot, ratio=0.4, data=(text,), **options)
    ids = token_ids(source)
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (custom(pivot), stock(out)))
    assert float((one - other).abs().max()) < 1e-3


def test_what_cannot_be_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="biases"):
        operate("compress", "aa-svd", checkpoint("jetmoe"), tmp_path / "out", ratio=0.2)
    with pytest.raises(UsageError, match="--calibration"):
        operate(
            "compress",
            "aa-svd",
            checkpoint("llama"),
            tmp_path / "out",
            ratio=0.2,
            calibration=tmp_path,
        )


def test_a_mixtures_attention_can_be_compressed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate(
        "compress",
        "aa-svd",
        source,
        tmp_path / "out",
        ratio=0.2,
        form="dense",
        targets="attention",
    )
    stock(tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name for name in changed)


def test_ranks_can_be_given_and_allocated(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama", tokenizer=True)

    def ranks(folder: Path) -> dict[str, int]:
        table = json.loads((folder / "rank_plan.json").read_text())["matrices"]
        return {name: entry["rank"] for name, entry in table.items()}

    operate("compress", "svd", source, tmp_path / "blind", ratio=0.3, allocate="energy")
    given = {"rank_plan": str(tmp_path / "blind" / "rank_plan.json")}
    operate("compress", "aa-svd", source, tmp_path / "given", **given)
    operate("compress", "aa-svd", source, tmp_path / "own", ratio=0.3, allocate="energy")
    assert ranks(tmp_path / "given") == ranks(tmp_path / "own") == ranks(tmp_path / "blind")
    assert len(set(ranks(tmp_path / "own").values())) > 2
    one, other = tensors(tmp_path / "given"), tensors(tmp_path / "own")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    blind = tensors(tmp_path / "blind")
    assert any(not torch.equal(tensor, blind[name]) for name, tensor in one.items())


class Stopping(Silent):
    """Interrupts the run in a stage."""

    def __init__(self, name: str) -> None:
        self.name, self.now = name, False

    def stage(self, name: str, total: int) -> None:
        self.now = name == self.name

    def advance(self, count: int = 1) -> None:
        if self.now and count:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("stage", ["calibrating", "aa-svd"])
def test_a_run_with_allocated_ranks_goes_on_where_it_stopped(
    stage: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama", tokenizer=True)
    options: dict[str, object] = {"ratio": 0.3, "allocate": "energy"}
    fields: dict[str, Any] = {"tokens": 200, "seq_len": 50, "workers": 1}
    for name in ("whole", "out"):
        request = Request("compress", "aa-svd", (str(source),), tmp_path / name, options, **fields)
        if name == "whole":
            run(request, Silent())
            continue
        with pytest.raises(Interrupted):
            run(request, Stopping(stage))
        run(dataclasses.replace(request, resume=True), Silent())
    whole, out = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert whole.keys() == out.keys()
    assert all(torch.equal(tensor, out[name]) for name, tensor in whole.items())
