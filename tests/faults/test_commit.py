"""The promise of the commit protocol: after any failure the output is whole, old or absent."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesurg.surgery.checkpoint import fs
from moesurg.surgery.errors import RefusedError

from . import operation
from .harness import KILLED, digest, effects, failing_at, in_child, no_waiting
from .operation import Scene


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs are six times as fast there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(params=["absent", "exchange", "two renames"])
def scene(
    request: pytest.FixtureRequest, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Scene]:
    """No old output; one replaced by exchange; one replaced where the system cannot exchange."""
    made = Scene(quick_path / "root", request.param)
    made.reset()
    if made.mode == "two renames":
        monkeypatch.setattr(fs, "_try_exchange", lambda _new, _old: False)
    with no_waiting():
        yield made


def uninterrupted(scene: Scene) -> tuple[str | None, str | None, list[tuple[str, Path]]]:
    """Digest of the output before and after an undisturbed run, and the run's effects."""
    before = digest(scene.output)
    seen = effects(scene.command())
    after = digest(scene.output)
    scene.reset()
    return before, after, seen


def test_the_output_is_what_was_written(scene: Scene) -> None:
    scene.command()()
    report = json.loads((scene.output / "report.json").read_bytes())
    for file, found in report["files"].items():
        assert hashlib.sha256((scene.output / file).read_bytes()).hexdigest() == found
    assert sorted(path.name for path in scene.output.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "report.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_failing_effect_leaves_old_or_new(scene: Scene, code: int) -> None:
    before, after, seen = uninterrupted(scene)
    clean = scene.left()
    for k in range(len(seen)):
        scene.reset()
        with failing_at(k, code) as failure, pytest.raises(RefusedError) as caught:
            scene.command()()
        assert failure.hit is not None
        assert ("disk full" in caught.value.message) == (code == errno.ENOSPC), failure.hit
        state = digest(scene.output)
        published = any(e in ("rename", "exchange") and p == scene.output for e, p in seen[:k])
        if published:
            # Too late to fail: the output is in place and the error says so.
            assert state in (before, after), failure.hit
            assert "is complete" in str(caught.value.hint) or state == before
        else:
            assert state == before, failure.hit
        assert scene.left() - {"out"} == clean - {"out"} or state == after, failure.hit
        assert not any("moesurg" in name for name in scene.left()), failure.hit


def test_killed_anywhere_and_resumed(scene: Scene) -> None:
    before, after, seen = uninterrupted(scene)
    for k in range(len(seen)):
        scene.reset()
        assert in_child(scene.command(), kill_at=k) == KILLED
        allowed = {before, after} | ({None} if scene.mode == "two renames" else set())
        assert digest(scene.output) in allowed, seen[k]
        scene.command(resume=True)()
        assert digest(scene.output) == after, seen[k]
        assert not any("moesurg" in name for name in scene.left()), seen[k]
    assert in_child(scene.command(), kill_at=len(seen) + 100) == (0 if scene.force else 70)


def test_killed_and_begun_afresh(scene: Scene) -> None:
    _, after, seen = uninterrupted(scene)
    for k in range(0, len(seen), 3):
        scene.reset()
        assert in_child(scene.command(), kill_at=k) == KILLED
        scene.command(force=True)()
        assert digest(scene.output) == after, seen[k]
        assert not any("moesurg" in name for name in scene.left()), seen[k]


def test_killed_many_times(scene: Scene) -> None:
    _, after, seen = uninterrupted(scene)
    dice = random.Random(5)
    for _ in range(30):
        scene.reset()
        story = [dice.randrange(len(seen))]
        assert in_child(scene.command(), kill_at=story[0]) == KILLED
        for _ in range(3):
            story.append(dice.randrange(len(seen)))
            again = scene.command(resume=dice.random() < 0.7, force=True)
            assert in_child(again, kill_at=story[-1]) in (KILLED, 0), story
        scene.command(resume=True, force=True)()
        assert digest(scene.output) == after, story
        assert not any("moesurg" in name for name in scene.left()), story


def test_failed_resume_keeps_the_earlier_work(scene: Scene) -> None:
    before, after, _ = uninterrupted(scene)
    with pytest.raises(KeyboardInterrupt):
        operation.run(scene.source, scene.output, force=scene.force, stop_at=7)
    for k in itertools.count():
        with failing_at(k, errno.EIO) as failure:
            try:
                operation.run(scene.source, scene.output, force=scene.force, resume=True, stop_at=7)
            except RefusedError:
                assert digest(scene.output) == before, failure.hit
            except KeyboardInterrupt:
                if failure.hit is None:
                    break
    computed = operation.run(scene.source, scene.output, force=scene.force, resume=True)
    assert computed == [6, 7]
    assert digest(scene.output) == after


def test_data_then_journal_then_rename_then_folder(scene: Scene) -> None:
    staging = scene.output.with_name(scene.output.name + ".moesurg-tmp")
    dirty: set[str] = set()
    unlisted: set[str] = set()  # created, but not surely found again after a power cut
    journalled = False
    published = None
    seen = effects(scene.command())
    for at, (effect, path) in enumerate(seen):
        inside = path.parent == staging
        if effect in ("pwrite", "create", "fallocate") and inside:
            assert published is None
            if path.name == "journal.jsonl":
                shards = {name for name in dirty | unlisted if name.endswith(".safetensors")}
                assert not (journalled and shards)
                journalled = effect == "pwrite"
            dirty.add(path.name)
            if effect == "create":
                unlisted.add(path.name)
        elif effect == "fsync_dir" and path == staging:
            unlisted.clear()
        elif effect in ("fsync", "fdatasync") and inside:
            dirty.discard(path.name)
        elif effect in ("exchange", "rename") and path == scene.output:
            assert not dirty | unlisted
            earlier = [step for step in seen[:at] if step[0] != "rename"]
            assert earlier[-1] == ("fsync_dir", staging)
            published = at
    assert published is not None
    assert seen[published + 1] == ("fsync_dir", scene.output.parent)


def test_killed_while_discarding_a_complete_staging(scene: Scene) -> None:
    _, after, seen = uninterrupted(scene)
    # Right before the output gets its name, all of it lies there and no journal is left.
    publish = next(k for k, (effect, _) in enumerate(seen) if effect in ("rename", "exchange"))
    for k in range(40):
        scene.reset()
        assert in_child(scene.command(), kill_at=publish) == KILLED
        assert in_child(scene.command(force=True), kill_at=k) == KILLED
        scene.command(resume=True, force=True)()
        assert digest(scene.output) == after


def test_complete_staging_is_only_renamed(scene: Scene) -> None:
    _, after, seen = uninterrupted(scene)
    publish = next(k for k, (effect, _) in enumerate(seen) if effect in ("rename", "exchange"))
    assert in_child(scene.command(), kill_at=publish) == KILLED
    computed = operation.run(scene.source, scene.output, force=scene.force, resume=True)
    assert computed == []
    assert digest(scene.output) == after
