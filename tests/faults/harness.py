"""Fail, or kill the process at, the k-th effect that a run has on the file system.

An operation is any function without arguments whose effects go through `checkpoint.fs`. First
`effects` lists what it does; then, for every k, `failing_at` or `in_child(kill_at=k)` runs it again
and the test looks at what is left. Children are forked, which takes milliseconds, so torch must not
have started its threads in the parent: keep it idle there, or run it in children only.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moesurg.surgery.checkpoint import fs

Operation = Callable[[], object]
Effect = tuple[str, Path]

KILLED = -signal.SIGKILL
FAILED = 70


@contextmanager
def observed(callback: Callable[[str, Path], None]) -> Iterator[None]:
    """Call ``callback`` right before every effect of the block, from whichever thread has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fs, "_before", callback)
        yield


def effects(operation: Operation) -> list[Effect]:
    """Run an operation to its end and list its effects in order."""
    seen: list[Effect] = []
    with observed(lambda effect, path: seen.append((effect, path))):
        operation()
    return seen


class Counter:
    """Does something at the k-th effect, counted from 0, and remembers which one it was."""

    def __init__(self, k: int, action: Callable[[], None]) -> None:
        self.hit: Effect | None = None
        self._left = k
        self._action = action
        self._guard = threading.Lock()

    def __call__(self, effect: str, path: Path) -> None:
        with self._guard:
            self._left -= 1
            if self._left != -1:
                return
            self.hit = effect, path
        self._action()


@contextmanager
def failing_at(k: int, code: int) -> Iterator[Counter]:
    """Let the k-th effect of the block fail with an errno, once."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    counter = Counter(k, fail)
    with observed(counter):
        yield counter


def in_child(operation: Operation, *, kill_at: int | None = None) -> int:
    """Run an operation in a forked process, killed right before its k-th effect if asked.

    Returns:
        0 after success, `FAILED` after an exception (its traceback goes to stderr), `KILLED`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about threads
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = FAILED
    try:
        if kill_at is None:
            operation()
        else:
            with observed(Counter(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                operation()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let fsync return at once. A killed process loses nothing by it, only a power cut would."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, lambda _fd: None, raising=False)
        yield


def digest(path: Path) -> str | None:
    """One hash over the names and bytes of all below a folder; None if there is nothing."""
    if not os.path.lexists(path):
        return None
    sha = hashlib.sha256()
    for entry in [path, *sorted(path.rglob("*"))]:
        content = entry.read_bytes() if entry.is_file() else None
        sha.update(repr((str(entry.relative_to(path)), content)).encode())
    return sha.hexdigest()
