"""The rules by which an output path is claimed, kept, given up and taken up again."""

from __future__ import annotations

import errno
import itertools
import shutil
from pathlib import Path

import pytest

from moesurg.surgery.checkpoint import fs
from moesurg.surgery.checkpoint.commit import Staging
from moesurg.surgery.checkpoint.writer import ShardWriter
from moesurg.surgery.errors import InputError, RefusedError, StoppedError

from . import operation
from .harness import KILLED, digest, effects, failing_at, in_child
from .operation import Scene


def test_stop_and_resume_repeat_no_unit(tmp_path: Path) -> None:
    place = Scene(tmp_path / "root", "absent")
    place.reset()
    operation.run(place.source, place.output)
    whole = digest(place.output)
    place.reset()
    with pytest.raises(KeyboardInterrupt):
        operation.run(place.source, place.output, stop_at=7)
    assert place.left() == {"made", "made/by", "made/by/the run.moesurg-tmp"} | {
        f"made/by/the run.moesurg-tmp/{name}"
        for name in (
            "journal.jsonl",
            "plan.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        )
    }
    # Units 0 to 5 were flushed; 6 was only noted.
    assert operation.run(place.source, place.output, resume=True) == [6, 7]
    assert digest(place.output) == whole
    assert operation.run(place.source, place.output, resume=True) == []
    assert place.left() == {"made", "made/by", "made/by/the run"}


def interrupted(tmp_path: Path) -> Scene:
    place = Scene(tmp_path / "root", "absent")
    place.reset()
    with pytest.raises(KeyboardInterrupt):
        operation.run(place.source, place.output, stop_at=7)
    return place


@pytest.mark.parametrize("torn", [b'{"unit": "layers.6", "res', b"\0" * 9, b"[]\n{}\n", b"\n"])
def test_torn_journal_line_is_ignored(tmp_path: Path, torn: bytes) -> None:
    place = interrupted(tmp_path)
    journal = place.output.with_name("the run.moesurg-tmp") / "journal.jsonl"
    sound = journal.read_bytes()
    journal.write_bytes(sound + torn)
    with pytest.raises(KeyboardInterrupt):
        operation.run(place.source, place.output, resume=True, stop_at=7)
    assert journal.read_bytes() == sound
    assert operation.run(place.source, place.output, resume=True) == [6, 7]


def test_killed_between_two_renames_the_next_run_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Scene(tmp_path / "root", "two renames")
    place.reset()
    monkeypatch.setattr(fs, "_try_exchange", lambda _new, _old: False)
    before = digest(place.output)
    seen = effects(place.command())
    place.reset()
    second = seen.index(("rename", place.output))
    assert in_child(place.command(), kill_at=second) == KILLED
    assert digest(place.output) is None
    with pytest.raises(RefusedError, match="already exists"):
        place.command(force=False)()
    assert digest(place.output) == before


def test_interrupted_repetition_is_not_taken_for_complete(tmp_path: Path) -> None:
    place = Scene(tmp_path / "root", "exchange")
    place.reset()
    place.command()()
    with pytest.raises(KeyboardInterrupt):
        operation.run(place.source, place.output, force=True, stop_at=7)
    assert operation.run(place.source, place.output, force=True, resume=True) == [6, 7]


def test_unsynced_files_are_synced_before_the_rename(tmp_path: Path) -> None:
    def run() -> None:
        shards = operation.plan()
        with Staging.open(tmp_path / "out", {}) as staging:
            ShardWriter(staging.path, shards, create=True).close()
            staging.commit()

    seen = effects(run)
    for shard in operation.plan():
        assert ("fsync", tmp_path / "out.moesurg-tmp" / shard.file) in seen


def test_lock_removed_by_its_holder_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "out.moesurg-lock"
    real = fs.try_lock
    calls: list[int] = []

    def try_lock(fd: int, path: Path) -> bool:
        if not calls:
            path.unlink()  # the run before us ends between our open and our lock
        calls.append(fd)
        return real(fd, path)

    monkeypatch.setattr(fs, "try_lock", try_lock)
    with Staging.open(tmp_path / "out", {}):
        assert len(calls) == 2
        assert lock.exists()
    assert not lock.exists()


def test_torn_first_line_begins_afresh(tmp_path: Path) -> None:
    place = interrupted(tmp_path)
    journal = place.output.with_name("the run.moesurg-tmp") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:20])
    assert operation.run(place.source, place.output, resume=True) == list(range(8))


def test_interrupted_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    place = interrupted(tmp_path)
    before = digest(place.root)
    with pytest.raises(RefusedError, match="interrupted run has left") as caught:
        operation.run(place.source, place.output)
    assert "--resume" in str(caught.value.hint)
    assert digest(place.root) == before
    assert operation.run(place.source, place.output, force=True) == list(range(8))


@pytest.mark.parametrize(
    ("change", "field", "old", "new"),
    [
        ({"version": "2"}, "version", '"1"', '"2"'),
        ({"options": {"rank": 8, "ratio": 0.5, "layers": [0, 1]}}, "options.rank", "4", "8"),
        ({"options": {"rank": 4, "layers": [0, 1]}}, "options.ratio", "0.5", "nothing"),
        ({"seed": None}, "seed", "nothing", "null"),
    ],
)
def test_resume_of_another_run_names_the_field(
    tmp_path: Path, change: dict[str, object], field: str, old: str, new: str
) -> None:
    place = interrupted(tmp_path)
    before = digest(place.root)
    other = {**operation.FINGERPRINT, **change}
    with pytest.raises(RefusedError) as caught:
        operation.run(place.source, place.output, resume=True, fingerprint=other)
    assert f"has {old} for {field}, this run has {new}" in caught.value.message
    assert digest(place.root) == before


def test_existing_output_is_refused_before_anything(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("a file")
    for resume in (False, True):
        seen = []
        with pytest.raises(RefusedError, match="already exists as a file") as caught:
            seen = effects(lambda resume=resume: Staging.open(output, {}, resume=resume))  # type: ignore[misc]
        assert seen == []
        assert "--force" in str(caught.value.hint)
    output.unlink()
    output.mkdir()
    with Staging.open(output, {}) as staging:  # an empty folder is no obstacle
        staging.write_file("a", b"1")
        staging.commit()
    with pytest.raises(RefusedError, match="a folder that is not empty"):
        Staging.open(output, {})
    with Staging.open(output, {}, force=True) as staging:
        staging.write_file("b", b"2")
        staging.commit()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "b"}


def test_force_replaces_a_file_and_keeps_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("a file")
    (tmp_path / "link").symlink_to("real")
    with Staging.open(tmp_path / "link", {}, force=True) as staging:
        staging.write_file("b", b"2")
        staging.commit()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "b").read_bytes() == b"2"


def test_output_that_appears_meanwhile_is_kept_and_so_is_the_work(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def run() -> None:
        with Staging.open(output, {}) as staging:
            staging.write_file("mine", b"1")
            output.mkdir()
            (output / "theirs").write_text("2")
            staging.commit()

    with pytest.raises(RefusedError, match="already exists"):
        run()
    assert [path.name for path in output.iterdir()] == ["theirs"]
    shutil.rmtree(output)
    with Staging.open(output, {}, resume=True) as staging:
        staging.commit()
    assert [path.name for path in output.iterdir()] == ["mine"]


def test_second_run_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Staging.open(output, {}) as staging:
        before = digest(tmp_path)
        for force, resume in itertools.product((False, True), repeat=2):
            with pytest.raises(RefusedError, match="another run is writing this output"):
                Staging.open(output, {}, force=force, resume=resume)

        def second() -> None:
            with pytest.raises(RefusedError, match="lock"):
                Staging.open(output, {})

        assert in_child(second) == 0
        assert digest(tmp_path) == before
        staging.write_file("a", b"1")
        staging.commit()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "a"}


def test_lock_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.moesurg-lock").touch()
    with Staging.open(tmp_path / "out", {}):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [StoppedError, KeyboardInterrupt])
def test_a_stop_keeps_and_other_ends_remove(tmp_path: Path, kind: type[BaseException]) -> None:
    output = tmp_path / "a" / "out"
    with Staging.open(output, {}):
        pass  # no commit
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), Staging.open(output, {}):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(kind), Staging.open(output, {}):
        raise kind("stop")
    assert [path.name for path in output.parent.iterdir()] == ["out.moesurg-tmp"]


def test_output_and_inputs_must_not_overlap(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "link").symlink_to("model")
    for output, how in [
        (model, "is"),
        (tmp_path / "link", "is"),
        (model / "out", "lies inside"),
        (tmp_path / "link" / "new" / "out", "lies inside"),
        (tmp_path / "x" / ".." / "model", "is"),
        (tmp_path, "contains"),
    ]:
        with pytest.raises(RefusedError, match=f" {how} the input"):
            Staging.open(output, {}, force=True, inputs=[model])
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "link"}


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "a/b/c", "a/..", "a//b", "a\\b", "C:a", "a\0"]
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source"
    source.touch()
    with Staging.open(tmp_path / "out", {}) as staging:
        with pytest.raises(InputError, match="plain file name"):
            staging.write_file(name, b"")
        with pytest.raises(InputError, match="plain file name"):
            staging.copy_file(source, name)
        with pytest.raises(InputError, match="moesurg uses that name"):
            staging.copy_file(source, "journal.jsonl")


def test_record_asks_for_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    order: list[str] = []
    with Staging.open(tmp_path / "out", {}) as staging:
        assert [staging.record(str(n), {}) for n in range(256)] == [False] * 255 + [True]
        staging.flush(lambda: order.append("sync"))
        staging.flush(lambda: order.append("nothing to sync"))
        assert order == ["sync"]
        assert len(staging.finished) == 256
        assert not staging.record("a", {"shape": (1, 2)})
        clock[0] = 1.0
        assert staging.record("b", {})
        staging.flush(lambda: None)
        assert staging.finished["a"] == {"shape": [1, 2]}  # as a resumed run would see it


def test_full_disk_says_how_much_is_missing(tmp_path: Path) -> None:
    target = tmp_path / "f"
    fd = fs.open_write(target, create=True)
    with failing_at(0, errno.ENOSPC), pytest.raises(RefusedError) as caught:
        fs.fallocate(fd, 12_345, target)
    assert f"of {target}" in caught.value.message
    assert "12,345 bytes needed" in caught.value.message
    assert " free" in caught.value.message
    assert caught.value.hint
    with failing_at(0, errno.EROFS), pytest.raises(RefusedError, match="no permission"):
        fs.truncate(fd, 3, target)
    with pytest.raises(RefusedError, match="at open"):
        fs.open_write(tmp_path / "missing", create=False)


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    with Staging.open(tmp_path / "out", {}) as staging:
        staging.write_file("a", b"1")
        staging.commit()
    plain = tmp_path / "plain"
    plain.touch()
    assert (tmp_path / "out" / "a").stat().st_mode == plain.stat().st_mode


def test_lengthening_stands_in_for_reserving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fs, "_reserve", lambda _fd, _size: False)
    target = tmp_path / "f"
    fd = fs.open_write(target, create=True)
    fs.fallocate(fd, 1000, target)
    assert target.stat().st_size == 1000
    with pytest.raises(RefusedError, match="disk full"):
        fs.fallocate(fd, 1 << 62, target)
