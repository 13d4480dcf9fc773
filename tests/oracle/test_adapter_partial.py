"""Merging adapters of which some lack a module, and tensors that adapters save in full."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesurg.surgery.errors import InputError, UsageError
from tests.oracle.helpers import operate, peft, token_ids
from tests.oracle.test_adapters import changes, distance, shelf

Checkpoint = Callable[..., Path]
HEAD = "base_model.model.lm_head.weight"


def spread(folders: list[Path], weights: list[float], *, skip: bool) -> dict[str, torch.Tensor]:
    """The weighted sums; with ``skip`` the weights of those that hold a module add up to those of all."""
    held = [changes(folder) for folder in folders]
    found = {}
    for name in {name for one in held for name in one}:
        having = [(one[name], w) for one, w in zip(held, weights, strict=True) if name in one]
        factor = sum(weights) / sum(w for _, w in having) if skip else 1.0
        found[name] = torch.stack([change * (w * factor) for change, w in having]).sum(0)
    return found


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("missing", ["zero", "skip"])
def test_weights_where_a_module_is_missing(
    method: str, missing: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = shelf(checkpoint)
    options = {"rank": 99} if method == "svd" else {}
    operate(
        "merge", method, folders, tmp_path / "out", weights="0.5,1,1.5", missing=missing, **options
    )
    expected = spread(folders, [0.5, 1.0, 1.5], skip=missing == "skip")
    assert distance(changes(tmp_path / "out"), expected) < 1e-4
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    units = report["units"]
    assert units["model.layers.0.self_attn.v_proj"]["contributors"] == [0, 1]
    assert "contributors" not in units["model.layers.0.self_attn.q_proj"]
    assert any(("counts as zero", "is skipped")[missing == "skip"] in n for n in report["notes"])


@pytest.mark.parametrize("method", ["core", "knots"])
@pytest.mark.parametrize("missing", ["zero", "skip"])
def test_a_mean_divides_by_all_or_by_contributors(
    method: str, missing: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = shelf(checkpoint)
    operate("merge", method, folders, tmp_path / "out", rule="mean", missing=missing)
    expected = spread(folders, [1 / 3] * 3, skip=missing == "skip")
    assert distance(changes(tmp_path / "out"), expected) < 1e-4


def test_ranks_by_energy_see_the_same_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A scaled sum has the ranks of the sum, so decisions may not depend on it."""
    folders = shelf(checkpoint)
    for missing in ("zero", "skip"):
        operate("merge", "svd", folders, tmp_path / missing, energy=0.9, missing=missing)
    first, second = (
        json.loads((tmp_path / m / "adapter_config.json").read_text()) for m in ("zero", "skip")
    )
    assert (first["r"], first["rank_pattern"]) == (second["r"], second["rank_pattern"])


def test_weights_that_cannot_be_shared_out(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = shelf(checkpoint)
    with pytest.raises(UsageError, match="add up to 0"):
        operate("merge", "cat", folders, tmp_path / "out", weights="1,-1,1", missing="skip")
    assert not list(tmp_path.iterdir())


# Tensors saved in full


def headed(checkpoint: Checkpoint, *seeds: int | None) -> list[Path]:
    """Adapters that differ, each with the head of a seed; None for one without."""
    vocabulary = json.loads((checkpoint("llama") / "config.json").read_text())["vocab_size"]
    folders = []
    for index, seed in enumerate(seeds):
        extra: dict[str, Any] = {}
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            head = torch.randn(vocabulary, 32, generator=generator)
            extra = {"extra": {HEAD: head}, "modules_to_save": ["lm_head"]}
        folders.append(checkpoint("adapter", seed=index, **extra))
    return folders


def head_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")[HEAD]


@pytest.mark.parametrize("method", ["cat", "core", "ties", "lora-lego"])
def test_the_head_that_all_share_is_copied(
    method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = headed(checkpoint, 5, 5)
    operate("merge", method, folders, tmp_path / "out")
    assert torch.equal(head_of(tmp_path / "out"), head_of(folders[0]))
    base = checkpoint("llama")
    adapted = peft(base, tmp_path / "out")
    with torch.no_grad():
        hidden = adapted(input_ids=token_ids(base), output_hidden_states=True)
    expected = hidden.hidden_states[-1] @ head_of(folders[0]).T
    torch.testing.assert_close(hidden.logits, expected, atol=1e-4, rtol=1e-4)


def test_heads_that_differ_need_a_choice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = headed(checkpoint, 5, 6)
    with pytest.raises(InputError, match=r"lm_head\.weight, saved in full, differs from that of"):
        operate("merge", "svd", folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first, second = map(head_of, folders)
    operate("merge", "svd", folders, tmp_path / "mean", full_tensors="mean", weights="1,3")
    torch.testing.assert_close(head_of(tmp_path / "mean"), 0.25 * first + 0.75 * second)
    operate("merge", "svd", folders, tmp_path / "first", full_tensors="first")
    assert torch.equal(head_of(tmp_path / "first"), first)
    with pytest.raises(UsageError, match="no mean"):
        operate("merge", "svd", folders, tmp_path / "none", full_tensors="mean", weights="1,-1")


def test_a_head_that_one_lacks(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """PEFT's own merger drops it without a word."""
    folders = headed(checkpoint, None, 6)
    with pytest.raises(InputError, match="does not, and means the base's there"):
        operate("merge", "cat", folders, tmp_path / "out")
    for mode in ("mean", "first"):
        operate("merge", "cat", folders, tmp_path / mode, full_tensors=mode)
        assert torch.equal(head_of(tmp_path / mode), head_of(folders[1]))
        peft(checkpoint("llama"), tmp_path / mode)


# Changes of full tensors against the base


def based(checkpoint: Checkpoint) -> tuple[Path, torch.Tensor]:
    """The base, whose head is stored, and its head."""
    base = checkpoint("llama", tie_word_embeddings=False)
    return base, load_file(base / "model.safetensors")["lm_head.weight"]


@pytest.mark.parametrize("weights", ["1,1,1", "0.5,-0.25,2"])
def test_changes_against_the_base_add_up(
    weights: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """An adapter without the tensor changes nothing."""
    folders, (base, start) = headed(checkpoint, 5, None, 6), based(checkpoint)
    options: dict[str, Any] = {"full_tensors": "ta", "base": str(base), "weights": weights}
    operate("merge", "svd", folders, tmp_path / "out", **options)
    first, _, third = map(float, weights.split(","))
    heads = [head_of(folders[index]).double() for index in (0, 2)]
    expected = start + first * (heads[0] - start) + third * (heads[1] - start)
    torch.testing.assert_close(head_of(tmp_path / "out"), expected.float(), atol=1e-6, rtol=1e-6)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [source["model_type"] for source in report["sources"]] == ["adapter"] * 3 + ["llama"]
    assert report["sources"][3]["files"]
    assert f"--base {base}" in " ".join(report["command"])
    peft(base, tmp_path / "out")
    for workers in (1, 2):
        target = tmp_path / f"workers_{workers}"
        operate("merge", "svd", folders, target, workers=workers, **options)
        assert torch.equal(head_of(target), head_of(tmp_path / "out"))


def test_one_adapter_or_equal_ones_give_their_tensor(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and in blocks as well."""
    monkeypatch.setattr("moesurg.surgery.methods.models._merge.BLOCK", 100)
    folders, (base, _) = headed(checkpoint, 5, 5), based(checkpoint)
    own = head_of(folders[0])
    options: dict[str, Any] = {"full_tensors": "ta", "base": str(base)}
    operate("merge", "cat", folders[:1], tmp_path / "one", **options)
    operate("merge", "cat", folders, tmp_path / "two", weights="0.25,0.75", **options)
    assert torch.equal(head_of(tmp_path / "one"), own)
    assert torch.equal(head_of(tmp_path / "two"), own)


def test_a_tied_head_of_the_base_is_its_embedding(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders, base = headed(checkpoint, 5), checkpoint("llama", tie_word_embeddings=True)
    stored = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in stored
    options = {"full_tensors": "ta", "base": str(base), "weights": "0.5"}
    operate("merge", "cat", folders, tmp_path / "out", **options)
    expected = (stored["model.embed_tokens.weight"] + head_of(folders[0])) / 2
    torch.testing.assert_close(head_of(tmp_path / "out"), expected, atol=1e-6, rtol=1e-6)


def test_ranks_by_energy_do_not_see_the_base(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders, (base, _) = headed(checkpoint, 5, 6), based(checkpoint)
    options: dict[str, Any] = {"full_tensors": "ta", "base": str(base), "energy": 0.9}
    operate("merge", "svd", folders, tmp_path / "out", **options)
    operate("merge", "svd", folders, tmp_path / "mean", full_tensors="mean", energy=0.9)
    first, second = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("out", "mean")
    )
    assert first == second


def test_bases_that_are_none(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders, (base, _) = headed(checkpoint, 5, 6), based(checkpoint)
    narrow = checkpoint("llama", vocab_size=320, tie_word_embeddings=False)
    for options, error, message in (
        ({"full_tensors": "ta"}, UsageError, "against the base"),
        ({"base": str(base)}, UsageError, "--base is read for --full-tensors ta only"),
        ({"full_tensors": "ta", "base": str(folders[0])}, InputError, "expected a model"),
        (
            {"full_tensors": "ta", "base": str(narrow)},
            InputError,
            r"lm_head.weight.*is \[320, 32\]",
        ),
    ):
        with pytest.raises(error, match=message):
            operate("merge", "cat", folders, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
