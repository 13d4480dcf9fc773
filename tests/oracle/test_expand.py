"""Custom outputs measured, and multiplied out again to stock models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.custom import CustomModel
from moesurg.surgery.errors import InputError
from moesurg.surgery.evaluate import evaluate_sources
from moesurg.surgery.progress import Silent
from tests.oracle.helpers import custom, operate, stock, tensors, token_ids

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize(("family", "form"), [("llama", "pivot"), ("qwen2", "factors")])
def test_a_compressed_model_multiplied_out_computes_the_same(
    family: str, form: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)  # qwen2 has biases
    operate("compress", "svd", source, tmp_path / "small", ratio=0.3, form=form)
    result = operate("convert", "expand", tmp_path / "small", tmp_path / "stock")
    assert result["tier"] == "stock"
    assert result["exactness"]["kind"] == "exact"
    ids = token_ids(source)
    with torch.no_grad():
        first = custom(tmp_path / "small")(input_ids=ids).logits
        second = stock(tmp_path / "stock")(input_ids=ids).logits
    assert float((first - second).abs().max()) < 1e-4
    before, after = tensors(source), tensors(tmp_path / "stock")
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert not [key for key in config if "moesurg" in key or key == "auto_map"]
    assert config["model_type"] == family
    assert not list((tmp_path / "stock").glob("*.py"))


def test_multiplied_out_it_is_the_dense_form_up_to_rounding(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    for form in ("pivot", "dense"):
        operate("compress", "svd", source, tmp_path / form, ratio=0.3, form=form)
    operate("convert", "expand", tmp_path / "pivot", tmp_path / "stock")
    found, wanted = tensors(tmp_path / "stock"), tensors(tmp_path / "dense")
    for name, tensor in wanted.items():
        lost = (found[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert float(lost) < 1e-2, name
    # Stock again, so that everything else can be done with it.
    operate("compress", "svd", tmp_path / "stock", tmp_path / "again", ratio=0.5)


def test_only_what_stock_classes_hold_is_multiplied_out(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama")
    with pytest.raises(InputError, match="takes custom models, the sources are models"):
        operate("convert", "expand", source, tmp_path / "out")
    operate("compress", "svd", source, tmp_path / "small", ratio=0.3)
    with pytest.raises(InputError, match="takes models, the sources are custom") as caught:
        operate("compress", "svd", tmp_path / "small", tmp_path / "out", ratio=0.3)
    assert "convert --expand" in str(caught.value.hint)
    with pytest.raises(InputError, match="brings model code"):
        operate("upcycle", "btx", [tmp_path / "small", source], tmp_path / "out", experts=2)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    linears = config["moesurg_linears"]
    for change, message in (
        ({"moesurg_other": {"layers": [0]}}, "moesurg_other cannot be stored as stock"),
        ({"moesurg_linears": {"layers.0.mlp.up_proj": {"form": "x"}}}, "unknown form 'x'"),
        (
            {"moesurg_linears": {**linears, "layers.0.mlp.up_proj": {"form": "pivot", "rank": 3}}},
            r"the config says F32 \[3, 32\]",
        ),
        (
            {"moesurg_linears": {"layers.7.mlp.up_proj": {"form": "pivot", "rank": 3}}},
            "no linear layer",
        ),
        ({"moesurg_linears": {"layers.0.mlp.up_proj": {"form": "pivot"}}}, "impossible sizes"),
        (
            {"moesurg_linears": {"layers.0.mlp.up_proj": {"form": "factors", "rank": 3}}},
            "is missing",
        ),
        ({"auto_map": {}}, "do not agree"),
    ):
        (tmp_path / "small" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match=message):
            operate("convert", "expand", tmp_path / "small", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_eval_takes_custom_outputs_and_runs_the_installed_code(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama", tokenizer=True)
    operate("compress", "svd", source, tmp_path / "small", ratio=0.3)
    operate("convert", "expand", tmp_path / "small", tmp_path / "stock")
    text = tmp_path / "prose.txt"
    text.write_text("a line of text to be read\n" * 20)

    def measure(folder: Path, reference: Path | None = None) -> dict[str, float]:
        found = evaluate_sources(
            str(folder),
            reference=None if reference is None else str(reference),
            data=[text],
            tokens=64,
            seq_len=16,
            device="cpu",
            progress=Silent(),
        )
        overall: dict[str, float] = found["overall"]
        return overall

    assert measure(tmp_path / "small")["loss"] == pytest.approx(
        measure(tmp_path / "stock")["loss"], rel=1e-5
    )
    both = measure(tmp_path / "small", tmp_path / "stock")
    assert both["max_logit_difference"] < 1e-4
    assert measure(source, tmp_path / "small")["kl"] > 1e-3
    code = tmp_path / "small" / "modeling_moesurg.py"
    code.write_text(code.read_text() + "\nraise SystemExit\n")
    with pytest.raises(InputError, match="not the model code of this version"):
        measure(tmp_path / "small")
    assert CustomModel.open(tmp_path / "small").family.model_type == "llama"
    with pytest.raises(InputError):
        Model.open(tmp_path / "small")
