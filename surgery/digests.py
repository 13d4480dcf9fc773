"""What identifies inputs: quick marks for planning and resume, full digests for the report."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

from .checkpoint.reader import Checkpoint, file_digest


def header_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config and headers: names, types, shapes, places. Reads no weight."""
    tensors = {
        name: [info.dtype, list(info.shape), info.file.name, info.begin, info.end]
        for name, info in checkpoint.tensors.items()
    }
    document = {"config": checkpoint.config, "tensors": tensors}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def file_marks(files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and modification time of files: what shows that an input changed between run and resume."""
    marks = {}
    for file in files:
        status = file.stat()
        marks[str(file)] = [status.st_size, status.st_mtime_ns]
    return marks


class Digests:
    """SHA-256 of files, computed in a background thread while the run works."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._found: dict[Path, str] = {}
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="moesurg-digests", daemon=True)
        self._thread.start()

    def finish(self) -> dict[Path, str]:
        """Digest by path, once all are known.

        Raises:
            InputError: a file could not be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            for file in self._files:
                self._found[file] = file_digest(file)
        except Exception as error:  # handed to the thread that asks
            self._error = error
