"""An output folder that is complete or absent, and a run that can be killed and resumed.

A run works in `<output>.moesurg-tmp` beside the output, under the lock `<output>.moesurg-lock`.
The journal in there states what the run is (its fingerprint) and which units are finished, each
noted only after its bytes have reached the disk. At the end all files are fsynced, the journal
goes, and one rename (or one exchange of names) makes the output.

What a killed process can leave, and what the next run makes of it:

* staging with a journal: `--resume` continues it, `--force` discards it;
* staging with neither journal nor matching report: nothing durable was done, or it was being
  discarded; a resume discards it and begins afresh;
* staging without journal but with the report of this very run: complete, only the rename is
  missing. `discard` removes the report first, so that no half-removed folder looks like this;
* the replaced folder at the staging name: the output has the report, the rest is discarded;
* on systems that cannot exchange names, killed between two renames: `<output>.moesurg-tmp-old`
  is the old output and gets its name back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import InputError, MoesurgError, RefusedError, StoppedError
from . import fs, journal
from .journal import JOURNAL, Journal, fingerprint_digest
from .lock import Lock
from .place import (
    REPORT,
    discard,
    occupied,
    plain_name,
    refuse_existing,
    refuse_overlap,
    report_digest,
)

__all__ = ["JOURNAL", "PLAN", "PRIVATE", "REPORT", "Staging", "fingerprint_digest"]

PLAN = "plan.json"
PRIVATE = frozenset({JOURNAL, PLAN})
"""Files of the staging folder that never reach the output."""

STAGED = ".moesurg-tmp"
"""What the folder of a run that is not finished ends in."""
FLUSH_SECONDS = 1.0
FLUSH_RECORDS = 256


class Staging:
    """The folder in which an output is made. Use `Staging.open`, as a context manager.

    Leaving the block without `commit`, or by an exception, removes all that the run made;
    `StoppedError` and `KeyboardInterrupt` keep the staging for a resume. So does any failure of a
    run that resumed: the work of the run before it is not its own to remove.

    Attributes:
        output: the target, symbolic links resolved.
        path: the staging folder.
        finished: journalled result of each finished unit, by its id, as read back from JSON.
        complete: a resumed run found its output already made; there is nothing to do.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], *, force: bool) -> None:
        """Touches nothing; use `Staging.open`."""
        self.output = Path(os.path.realpath(output))
        if not self.output.name:
            raise InputError(f"the output {self.output} is the root of a file system")
        self.path = self.output.with_name(self.output.name + STAGED)
        self.finished: dict[str, dict[str, Any]] = {}
        self.complete = False
        self._lock_path = self.output.with_name(self.output.name + ".moesurg-lock")
        self._aside = self.output.with_name(self.output.name + STAGED + "-old")
        # As it will be read back: lists for tuples, text for keys.
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._force = force
        self._lock: Lock | None = None
        self._journal: Journal | None = None
        self._buffer: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._parents: list[Path] = []
        self._mine: Path | None = None  # the folder that `abandon` has to remove

    @classmethod
    def open(
        cls,
        output: Path,
        fingerprint: dict[str, Any],
        *,
        force: bool = False,
        resume: bool = False,
        inputs: Sequence[Path] = (),
    ) -> Staging:
        """Claim an output path, creating the staging folder or taking up an interrupted one.

        Args:
            output: the folder to make; missing parents are created.
            fingerprint: what decides the bytes of the output, as JSON values. A resumed run must
                have an equal one.
            force: replace an existing output once the new one is complete; discard an interrupted
                run unless ``resume``.
            resume: continue an interrupted run; begin afresh if there is none.
            inputs: files and folders that are read: none may overlap the output.

        Raises:
            RefusedError: the output exists, another run makes it at this moment, an interrupted
                run lies there or is another one, or the file system fails.
            InputError: the path cannot be an output.
        """
        self = cls(output, fingerprint, force=force)
        refuse_overlap((self.output, self.path, self._aside), inputs)
        done = resume and self._is_complete()
        if done and not any(map(os.path.lexists, (self.path, self._aside, self._lock_path))):
            self.complete = True
            return self
        if not done:
            # Before anything is created, and once more under the lock.
            refuse_existing(self.output, force=force)
        try:
            self._create_parents()
            self._lock = Lock(self._lock_path)
            self._begin(resume=resume)
        except BaseException as error:
            self._clean_up(self.abandon, error)
            raise
        return self

    def record(self, unit: str, result: dict[str, Any]) -> bool:
        """Note a finished unit for the next `flush`; True when it is time for one."""
        self._buffer.append({"unit": unit, "result": result})
        late = time.monotonic() - self._flushed >= FLUSH_SECONDS
        return late or len(self._buffer) >= FLUSH_RECORDS

    def flush(self, sync: Callable[[], None]) -> None:
        """Make the noted units durable: first their bytes by ``sync``, then their journal lines."""
        if not self._buffer:
            return
        if self._journal is None:
            raise RuntimeError("flush of a staging folder that is not open")
        sync()
        self._journal.append(self._buffer)
        for entry in json.loads(json.dumps(self._buffer)):
            self.finished[entry["unit"]] = entry["result"]
        self._buffer = []
        self._flushed = time.monotonic()

    def write_file(self, name: str, data: bytes) -> None:
        """Create or replace a small file of the output (or the private ``plan.json``)."""
        fs.write_file(self.place(name, private=frozenset({JOURNAL})), data)

    def place(self, name: str, *, private: frozenset[str] = PRIVATE) -> Path:
        """Where a file of the output is to be written; its folder is there afterwards."""
        path = self.path / plain_name(name, private=private)
        fs.ensure_dir(path.parent)
        return path

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file of an input into the output."""
        fs.copy_file(source, self.path / plain_name(name, private=PRIVATE))

    def remove_file(self, name: str) -> None:
        """Remove a file that only the run itself needed, if it is there."""
        path = self.path / plain_name(name, private=PRIVATE)
        if os.path.lexists(path):
            fs.unlink(path)

    def commit(self) -> None:
        """Make the staging folder the output. Everything is on the disk before the rename.

        Raises:
            RefusedError: an output has appeared meanwhile (the staging is kept for a resume), or
                the file system fails.
        """
        if self._journal is None:
            raise RuntimeError("commit of a staging folder that is not open")
        try:
            refuse_existing(self.output, force=self._force)
        except RefusedError:
            self._mine = None
            raise
        for entry in sorted(self.path.iterdir()):
            if entry.name == PLAN:
                fs.unlink(entry)
            elif entry.is_dir():
                for inner in sorted(entry.iterdir()):
                    fs.fsync_file(inner)
                fs.fsync_dir(entry)
            elif entry.name != JOURNAL:
                fs.fsync_file(entry)
        fs.fsync_dir(self.path)
        # From here on the folder is complete, and the missing journal says so.
        self._close_journal()
        fs.unlink(self.path / JOURNAL)
        fs.fsync_dir(self.path)
        self._publish()

    def abandon(self) -> None:
        """Remove everything that this run created. Doing it twice is harmless."""
        self._close_journal()
        if self._mine is not None:
            discard(self._mine)
            self._mine = None
        if self._lock is not None:
            self._lock.release()
        while self._parents:
            with suppress(MoesurgError):  # somebody else may have put something there
                fs.rmdir(self._parents.pop())

    def release(self) -> None:
        """Keep the staging folder for a resume and let go of it. Unflushed records are lost."""
        self._close_journal()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, StoppedError | KeyboardInterrupt):
            self._clean_up(self.release, error)
        elif error is not None:
            self._clean_up(self.abandon, error)
        else:
            self.abandon()

    def _begin(self, *, resume: bool) -> None:
        """Under the lock: bring what lies there into order and open the journal."""
        if os.path.lexists(self._aside):
            if os.path.lexists(self.output):
                discard(self._aside)
            else:
                fs.rename(self._aside, self.output)
        if resume and self._is_complete():
            discard(self.path)
            if self._lock is not None:
                self._lock.release()
            self.complete = True
            return
        refuse_existing(self.output, force=self._force)
        if not os.path.lexists(self.path):
            self._start()
        elif resume:
            self._resume()
        elif self._force:
            self._restart()
        else:
            raise RefusedError(
                f"an interrupted run has left {self.path}",
                hint="--resume continues it, --force discards it and begins afresh",
            )

    def _start(self) -> None:
        self._mine = self.path
        fs.mkdir(self.path)
        fs.fsync_dir(self.path.parent)
        self._journal = Journal(self.path, length=None)
        self._journal.append([{"fingerprint": self._fingerprint}])
        fs.fsync_dir(self.path)

    def _restart(self) -> None:
        self._mine = self.path
        discard(self.path)
        self._start()

    def _resume(self) -> None:
        found = journal.read(self.path)
        if found is None:
            if report_digest(self.path) == fingerprint_digest(self._fingerprint):
                self._publish()
                self.complete = True
            else:
                self._restart()
            return
        for field, theirs, mine in journal.differences(found.fingerprint, self._fingerprint):
            raise RefusedError(
                f"the interrupted run in {self.path} has {theirs} for {field}, this run has {mine}",
                hint="--resume needs the command of that run; --force alone discards it",
            )
        self.finished = found.finished
        self._journal = Journal(self.path, length=found.length)

    def _publish(self) -> None:
        replaced: Path | None = None
        if occupied(self.output):
            replaced = fs.exchange(self.path, self.output, self._aside)
        else:
            fs.rename(self.path, self.output)
        self._mine = replaced
        created, self._parents = self._parents, []
        try:
            for folder in [self.output, *reversed(created)]:
                fs.fsync_dir(folder.parent)
            self.abandon()  # what it would remove now is the replaced output
        except RefusedError as error:
            hint = f"{self.output} is complete; what is left beside it can be removed"
            raise RefusedError(error.message, hint=hint) from error

    def _is_complete(self) -> bool:
        mine = fingerprint_digest(self._fingerprint)
        return report_digest(self.output) == mine and journal.read(self.path) is None

    def _create_parents(self) -> None:
        missing = [folder for folder in self.output.parents if not os.path.lexists(folder)]
        for folder in reversed(missing):
            fs.mkdir(folder)
            self._parents.append(folder)

    def _clean_up(self, step: Callable[[], None], error: BaseException) -> None:
        """Run ``step`` after ``error``, which stays the error that the user sees."""
        try:
            step()
        except MoesurgError as another:
            error.add_note(f"cleaning up failed as well: {another.message}")
        finally:
            if self._lock is not None:
                self._lock.close()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
