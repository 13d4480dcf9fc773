"""The journal of a run: what the run is, and which of its units are durable.

One JSON document per line. The first is ``{"fingerprint": {...}}``, each further one
``{"unit": id, "result": {...}}``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import fs

JOURNAL = "journal.jsonl"


def fingerprint_digest(fingerprint: dict[str, Any]) -> str:
    """Hexadecimal SHA-256 of the canonical JSON text of a fingerprint."""
    return hashlib.sha256(_canonical(fingerprint).encode()).hexdigest()


@dataclass(frozen=True)
class Entries:
    """What a journal says.

    Args:
        fingerprint: of the run that wrote it.
        finished: the result of each finished unit by its id.
        length: bytes of the sound part; what follows was torn by a kill or a power cut.
    """

    fingerprint: dict[str, Any]
    finished: dict[str, dict[str, Any]]
    length: int


def read(folder: Path) -> Entries | None:
    """The journal of a staging folder; None if it has no sound first line."""
    fingerprint: dict[str, Any] | None = None
    finished: dict[str, dict[str, Any]] = {}
    length = 0
    try:
        lines = [] if folder.is_symlink() else (folder / JOURNAL).read_bytes().split(b"\n")
    except OSError:
        return None
    for line in lines[:-1]:  # what follows the last line break is not a whole line
        try:
            entry = json.loads(line)
            if fingerprint is None:
                fingerprint = entry["fingerprint"]
            else:
                finished[entry["unit"]] = entry["result"]
        except (ValueError, KeyError, TypeError):
            break  # a lost record only means a unit done again, so trust nothing from here on
        length += len(line) + 1
    return None if fingerprint is None else Entries(fingerprint, finished, length)


class Journal:
    """An open journal that lines are appended to."""

    def __init__(self, folder: Path, *, length: int | None) -> None:
        """Create the journal of ``folder``, or go on after its first ``length`` bytes."""
        self._path = folder / JOURNAL
        fresh = length is None
        self._fd: int | None = fs.open_write(self._path, create=fresh, truncate=fresh)
        self._end = length or 0
        if not fresh:
            # A torn last line would spoil the line appended to it.
            try:
                fs.truncate(self._fd, self._end, self._path)
            except BaseException:
                self.close()
                raise

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add one line for each entry and wait until they are on the disk."""
        if self._fd is None:
            raise RuntimeError(f"the journal {self._path} is closed")
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        fs.pwrite(self._fd, data, self._end, self._path)
        fs.fsync(self._fd, self._path)
        self._end += len(data)

    def close(self) -> None:
        """Close the file. Closing twice is harmless."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def differences(old: Any, new: Any, field: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted path of each field of two JSON values that differs, with both as short texts."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            here = f"{field}.{key}" if field else key
            if key not in old or key not in new:
                yield here, _short(old, key), _short(new, key)
            else:
                yield from differences(old[key], new[key], here)
    elif _canonical(old) != _canonical(new):
        yield field, _short({field: old}, field), _short({field: new}, field)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _short(fields: dict[str, Any], key: str) -> str:
    text = _canonical(fields[key]) if key in fields else "nothing"
    return text if len(text) <= 120 else text[:117] + "..."
