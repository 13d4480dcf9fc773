"""Whole operations: killed anywhere, starved of disk, given damaged input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.checkpoint import fs
from moesurg.surgery.errors import (
    InputError,
    Interrupted,
    MoesurgError,
    RefusedError,
    VerificationError,
)
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.faults.harness import digest, effects, failing_at
from tests.oracle.helpers import calibrated, operate, rewrite, tensors

Checkpoint = Callable[..., Path]


def statistics(source: Path, output: Path) -> Path:
    return calibrated(source, output, tokens=200, seq_len=50)


@pytest.mark.parametrize("command", ["upcycle", "merge"])
def test_killed_at_any_effect_it_resumes_to_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path, root: Path, command: str
) -> None:
    source = checkpoint("llama" if command == "upcycle" else "qwen3_moe", num_hidden_layers=1)
    words = [command, str(source), str(tmp_path / "work")]
    (tmp_path / "work").mkdir()
    if command == "merge":
        words.append(str(statistics(source, tmp_path / "statistics")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.every_effect", *words],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout)["effects"] > 30


class Interrupting(Silent):
    """Sends this process a signal once some units are done, as a user at the keyboard would."""

    def __init__(self, which: signal.Signals, after: int) -> None:
        self._which, self._left = which, after
        self.notes: list[str] = []

    def advance(self, count: int = 1) -> None:
        self._left -= count
        if self._left == 0:
            os.kill(os.getpid(), self._which)

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_between_units_and_the_run_can_be_resumed(
    checkpoint: Checkpoint, tmp_path: Path, which: signal.Signals
) -> None:
    source = checkpoint("llama")
    operate("upcycle", "sparse", source, tmp_path / "whole", experts=4, workers=1)
    request = Request(
        "upcycle", "sparse", (str(source),), tmp_path / "out", {"experts": 4}, workers=1
    )
    progress = Interrupting(which, after=3)
    before = signal.getsignal(which)
    with pytest.raises(Interrupted) as caught:
        run(request, progress)
    assert caught.value.exit_code == 128 + which
    assert len(progress.notes) == 1
    assert signal.getsignal(which) == before
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.moesurg-tmp" / "journal.jsonl").is_file()
    with pytest.raises(RefusedError, match="interrupted run has left"):
        run(request, Silent())
    with pytest.raises(RefusedError, match="for seed"):
        run(dataclasses.replace(request, resume=True, seed=1), Silent())
    run(dataclasses.replace(request, resume=True), Silent())
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert run(dataclasses.replace(request, resume=True), Silent())["already_complete"]


def test_a_resume_refuses_an_input_that_changed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("llama"), source)
    request = Request(
        "upcycle", "sparse", (str(source),), tmp_path / "out", {"experts": 4}, workers=1
    )
    with pytest.raises(Interrupted):
        run(request, Interrupting(signal.SIGINT, after=3))
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(RefusedError, match=r"model\.safetensors: changed since"):
        run(dataclasses.replace(request, resume=True), Silent())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, code: int
) -> None:
    source, output = checkpoint("llama", num_hidden_layers=1), tmp_path / "out"

    def operation() -> None:
        operate("upcycle", "sparse", source, output, experts=2, top_k=1, workers=1)

    count = len(effects(operation))
    shutil.rmtree(output)
    refused = 0
    for k in range(count):
        with failing_at(k, code) as counter:
            try:
                operation()
            except RefusedError as error:
                refused += 1
                assert error.exit_code == 4
                assert str(tmp_path) in error.message
        if output.exists():
            # The failure came after the rename: what is there is whole.
            assert (output / "report.json").is_file(), counter.hit
            shutil.rmtree(output)
        for left in tmp_path.iterdir():
            assert counter.hit is not None
            assert counter.hit[0] in {"unlink", "rmdir", "rmtree"}, counter.hit
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert refused > count // 2


def test_a_disk_too_small_is_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(fs, "_before", lambda *_: pytest.fail("wrote something"))
    with pytest.raises(RefusedError, match="1,000 are free"):
        operate("upcycle", "sparse", checkpoint("llama"), tmp_path / "out", experts=4)


def test_too_little_memory_is_refused_naming_the_unit(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=r"unit layer.* needs about"):
        operate(
            "merge", "m-smoe", checkpoint("mixtral"), tmp_path / "out", experts=4, max_memory=1000
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["mlp.up_proj", "self_attn.q_proj"])
def test_a_weight_that_is_not_finite_is_named(
    checkpoint: Checkpoint, tmp_path: Path, value: float, place: str
) -> None:
    source = checkpoint("llama", dtype="bfloat16")
    name = f"model.layers.1.{place}.weight"
    spoilt = tensors(source)[name].clone()
    spoilt[3, 5] = value
    damaged = rewrite(source, tmp_path / "damaged", {name: spoilt})
    element = 3 * spoilt.shape[1] + 5
    with pytest.raises(InputError, match=rf"{name}.*element {element} of") as caught:
        operate("upcycle", "sparse", damaged, tmp_path / "out", experts=4)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_failed_force_leaves_the_old_output(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, output = checkpoint("llama", dtype="bfloat16"), tmp_path / "out"
    operate("upcycle", "sparse", source, output, experts=2)
    before = digest(output)
    name = "model.layers.2.mlp.down_proj.weight"
    damaged = rewrite(
        source, tmp_path / "damaged", {name: torch.full_like(tensors(source)[name], torch.nan)}
    )
    with pytest.raises(InputError):
        operate("upcycle", "sparse", damaged, output, experts=2, force=True)
    assert digest(output) == before
    operate("upcycle", "sparse", source, output, experts=4, force=True)
    assert digest(output) != before


def test_an_existing_output_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RefusedError, match="already exists"):
        operate("upcycle", "sparse", checkpoint("llama"), tmp_path / "out", experts=4)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_statistics_of_another_model_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = statistics(checkpoint("qwen3_moe"), tmp_path / "statistics")
    # Another seed: the same sizes, so that only the digest tells.
    other = checkpoint("qwen3_moe", seed=1)
    with pytest.raises(InputError, match="statistics of another model"):
        operate("merge", "m-smoe", other, tmp_path / "out", experts=4, calibration=found)
    assert not (tmp_path / "out").exists()


def test_routed_statistics_do_not_serve_a_method_that_needs_all_experts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    found = statistics(source, tmp_path / "statistics")
    with pytest.raises(InputError, match="all-expert statistics"):
        operate("merge", "sub-moe", source, tmp_path / "out", experts=4, calibration=found)


def test_verify_finds_one_flipped_bit_in_every_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "out"
    operate("upcycle", "sparse", checkpoint("llama"), output, experts=2, max_shard_bytes=100_000)
    for file in sorted(output.iterdir()):
        data = file.read_bytes()
        damaged = bytearray(data)
        damaged[len(data) // 2] ^= 1
        file.write_bytes(bytes(damaged))
        with pytest.raises((VerificationError, InputError)) as caught:
            verify(str(output), reference=None, device="cpu", progress=Silent())
        assert file.name in str(caught.value), file.name
        assert isinstance(caught.value, MoesurgError)
        file.write_bytes(data)
    assert verify(str(output), reference=None, device="cpu", progress=Silent())["verified"]


def test_verify_measures_a_broken_promise(checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "out"
    operate("upcycle", "sparse", checkpoint("llama"), output, experts=2)
    other = checkpoint("llama", seed=9)
    with pytest.raises(VerificationError, match="promised exact"):
        verify(str(output), reference=str(other), device="cpu", progress=Silent())
