"""The lock file beside an output: held by one run, removed by its holder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ..errors import MoesurgError, RefusedError
from . import fs


class Lock:
    """A lock that this process holds until it is released or dies.

    Raises:
        RefusedError: another run holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = _acquire(path)

    def close(self) -> None:
        """Let go of the lock and leave its file. Closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        """Let go of the lock and remove its file. Releasing twice is harmless."""
        if self._fd is None:
            return
        # Removed while locked, so that nobody else can hold a lock on the name being removed.
        if os.name == "posix" and _holds(self._fd, self._path):
            fs.unlink(self._path)
        self.close()
        if os.name != "posix":
            with suppress(MoesurgError):  # there an open file cannot be removed
                fs.unlink(self._path)


def _acquire(path: Path) -> int:
    while True:
        fd = fs.open_write(path, create=True)
        try:
            if not fs.try_lock(fd, path):
                raise RefusedError(
                    f"another run is writing this output: it holds the lock {path}",
                    hint="wait for it to end or choose another --output",
                )
        except BaseException:
            os.close(fd)
            raise
        if _holds(fd, path):
            return fd
        os.close(fd)  # its holder removed the file between our open and our lock


def _holds(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
