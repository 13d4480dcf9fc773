"""What no method of `upcycle` and `expert` works on: refused with the reason and exit code 3, with nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesurg.surgery import methods

Checkpoint = Callable[..., Path]

NEEDED = {
    "upcycle": ["--experts", "2", "--top-k", "1"],
    "virtual-groups": ["--granularity", "2"],
    "add": ["--copy", "0"],
    "drop": ["--which", "1"],
    "mute": ["--more", "one", "--less", "other", "--count", "1"],
    "opt-out": ["--which", "1"],
    "lowrank": ["--rank", "2"],
    "null": ["--zero", "1"],
    "pad": ["--experts", "12"],
}
"""Options without which a command line would not be read so far."""

EXPERT, UPCYCLE = methods.names("expert"), methods.names("upcycle")


def line(command: str, name: str, sources: list[Path], output: Path) -> list[object]:
    own = (
        NEEDED.get(name, []) if command == "expert" else [*NEEDED["upcycle"], *NEEDED.get(name, [])]
    )
    known = {
        f"--{field.replace('_', '-')}"
        for field in methods.load(command, name).options.__dataclass_fields__
    }
    pairs = list(zip(own[::2], own[1::2], strict=True))
    kept = [word for pair in pairs if pair[0] in known for word in pair]
    return [*methods.spelt(command, name, list(map(str, sources))), *kept, "-o", output]


@pytest.mark.parametrize("name", EXPERT)
def test_dense_models_have_no_experts(
    name: str, checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    shown = call_cli(*line("expert", name, [checkpoint("llama")], tmp_path / "out"))
    assert shown.code == 3
    assert "has no experts" in shown.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", UPCYCLE)
def test_mixtures_are_not_grown(
    name: str, checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    sources = [checkpoint("mixtral"), checkpoint("mixtral", seed=1)]
    one = call_cli(*line("upcycle", name, sources[:1], tmp_path / "out"))
    two = call_cli(*line("upcycle", name, sources, tmp_path / "out"))
    assert one.code == two.code == 3
    assert "is a mixture already" in one.err + two.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "name"),
    [("upcycle", name) for name in UPCYCLE] + [("expert", name) for name in EXPERT],
)
def test_unknown_parents_are_named(
    command: str, name: str, checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    shown = call_cli(*line(command, name, [folder, folder], tmp_path / "out"))
    assert shown.code == 3
    assert "'gpt2' is not supported" in shown.err
    assert not (tmp_path / "out").exists()


def other_tokenizer(source: Path, target: Path) -> Path:
    """The same model with two tokens of its tokenizer exchanged."""
    shutil.copytree(source, target)
    file = target / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    return target


@pytest.mark.parametrize("name", ["bam", "btx"])
def test_branches_have_one_tokenizer_and_one_shape(
    name: str, checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    source = checkpoint("llama")
    renamed = other_tokenizer(source, tmp_path / "renamed")
    wider = checkpoint("llama", intermediate_size=64)
    for other, reason in ((renamed, "token "), (wider, "intermediate_size is 64")):
        shown = call_cli(*line("upcycle", name, [source, other], tmp_path / "out"))
        assert shown.code == 3
        assert reason in shown.err
    assert not (tmp_path / "out").exists()


def test_an_added_model_has_the_tokenizer_of_the_mixture(
    checkpoint: Checkpoint, call_cli: Callable[..., Any], tmp_path: Path
) -> None:
    renamed = other_tokenizer(checkpoint("llama"), tmp_path / "renamed")
    shown = call_cli("expert", "add", checkpoint("mixtral"), renamed, "-o", tmp_path / "out")
    assert shown.code == 3
    assert "token " in shown.err
    assert not (tmp_path / "out").exists()
