"""Branch-Train-MiX: experts are the sources' bytes, the rest is their mean, and N equal models are one model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.errors import InputError
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.oracle.helpers import PAIRS, drift, operate, stock, tensors

Checkpoint = Callable[..., Path]


def edited(source: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy of a folder with values of a JSON file changed."""
    shutil.copytree(source, target)
    document = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**document, **values}))
    return target


@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_equal_models_are_one_model(
    checkpoint: Checkpoint, tmp_path: Path, family: str, target: str
) -> None:
    source, output = checkpoint(family), tmp_path / "moe"
    result = operate("upcycle", "btx", [source] * 3, output, target=target)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, output) < 1e-4
    found = verify(str(output), reference=None, device="cpu", progress=Silent())
    assert found["exactness"]["measured"] < 1e-4


def test_equal_files_elsewhere_are_the_same_model_without_a_promise(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    copy = shutil.copytree(source, tmp_path / "copy")
    result = operate("upcycle", "btx", [source, copy], tmp_path / "moe")
    assert result["exactness"]["kind"] == "approximate"
    assert drift(source, tmp_path / "moe") < 1e-4
    dense, moe = tensors(source), tensors(tmp_path / "moe")
    kept = [name for name in dense if ".mlp." not in name]
    assert all(torch.equal(dense[name], moe[name]) for name in kept)


def test_experts_are_bytes_and_the_rest_is_the_mean(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sources = [checkpoint("qwen2", dtype="bfloat16", seed=seed) for seed in range(3)]
    output = tmp_path / "moe"
    result = operate("upcycle", "btx", sources, output)
    assert result["exactness"]["kind"] == "approximate"
    dense, moe = [tensors(source) for source in sources], tensors(output)
    for name in dense[0]:
        if ".mlp." not in name:
            mean = torch.stack([found[name].double() for found in dense]).mean(dim=0)
            assert torch.equal(moe[name], mean.to(torch.bfloat16)), name
            continue
        prefix, projection = name.split("mlp.")
        for number, found in enumerate(dense):
            assert torch.equal(moe[f"{prefix}mlp.experts.{number}.{projection}"], found[name])
    stock(output)
    report = json.loads((output / "report.json").read_text())
    assert [entry["path"] for entry in report["sources"]] == [str(source) for source in sources]
    assert len({str(entry["files"]["model.safetensors"]) for entry in report["sources"]}) == 3
    spread = report["units"]["mean.model.layers.0.self_attn.q_proj.weight.0"]["relative_variance"]
    # Three independent matrices: their mean holds a third of their power.
    assert spread == pytest.approx(2 / 3, abs=0.05)


def test_large_tensors_are_averaged_in_blocks(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesurg.surgery.methods.upcycle import _branches

    sources = [checkpoint("llama", seed=seed) for seed in range(2)]
    operate("upcycle", "btx", sources, tmp_path / "whole")
    monkeypatch.setattr(_branches, "BLOCK", 100)
    operate("upcycle", "btx", sources, tmp_path / "blocks", workers=1)
    whole, blocks = tensors(tmp_path / "whole"), tensors(tmp_path / "blocks")
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_models_that_differ_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    cases = [
        ([source], "two or more"),
        ([source, checkpoint("mixtral")], "is a mixture already"),
        ([source, checkpoint("mistral")], "is mistral"),
        ([source, checkpoint("llama", intermediate_size=40)], "intermediate_size is 40"),
        ([source, checkpoint("llama", dtype="bfloat16")], "is BF16"),
        (
            [
                source,
                checkpoint("llama", rope_parameters={"rope_type": "default", "rope_theta": 5.0}),
            ],
            "rope_parameters is",
        ),
    ]
    for sources, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            operate("upcycle", "btx", sources, tmp_path / "moe")
    with pytest.raises(InputError, match="top-k 3 is more than"):
        operate("upcycle", "btx", [source] * 2, tmp_path / "moe", top_k=3)
    assert not list(tmp_path.iterdir())


def test_another_vocabulary_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    document = json.loads((source / "tokenizer.json").read_text())
    model = document["model"]
    vocabulary = dict(model["vocab"])
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    swapped = edited(
        source, tmp_path / "swapped", "tokenizer.json", model={**model, "vocab": vocabulary}
    )
    with pytest.raises(InputError, match="token 0 is"):
        operate("upcycle", "btx", [source, swapped], tmp_path / "moe")
    shutil.copytree(source, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    result = operate("upcycle", "btx", [source, tmp_path / "bare"], tmp_path / "moe")
    assert "not compared" in result["notes"][0]


def test_token_ids_and_spellings_may_differ(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    other = edited(source, tmp_path / "other", "config.json", eos_token_id=5, head_dim=8)
    operate("upcycle", "btx", [source, other], tmp_path / "moe")
    assert drift(source, tmp_path / "moe") < 1e-4


def test_licences_are_settled_by_people(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("llama")
    names = ("apache", "mit", "silent")
    folders = [Path(shutil.copytree(source, tmp_path / name)) for name in names]
    (folders[0] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folders[1] / "README.md").write_text("---\nlicense: mit\n---\n")
    (folders[0] / "NOTICE").write_text("ours")
    (folders[2] / "NOTICE").write_text("theirs")
    with pytest.raises(InputError, match=r"licence is mit, that of .* is apache-2.0"):
        operate("upcycle", "btx", folders[:2], tmp_path / "moe", dry_run=True)
    operate("upcycle", "btx", [folders[0], folders[2]], tmp_path / "moe")
    assert "license: apache-2.0" in (tmp_path / "moe" / "README.md").read_text()
    assert (tmp_path / "moe" / "NOTICE").read_text() == "ours"
    assert (tmp_path / "moe" / "NOTICE.2").read_text() == "theirs"
