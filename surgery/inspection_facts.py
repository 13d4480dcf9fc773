"""Facts of any checkpoint folder, told from its headers and its report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint.header import read_json
from .checkpoint.place import REPORT
from .checkpoint.reader import Checkpoint, contained

_NUMBER = re.compile(r"([0-9]+)")
PROVENANCE = (
    "moesurg",
    "operation",
    "method",
    "options",
    "seed",
    "command",
    "sources",
    "tier",
    "exactness",
    "fingerprint",
)
"""Keys of our report that say where a folder came from."""


def dtypes(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Tensors, parameters and bytes by stored type."""
    found: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        row = found.setdefault(info.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += count(info.shape)
        row["bytes"] += info.nbytes
    return dict(sorted(found.items()))


def shards(checkpoint: Checkpoint) -> list[dict[str, object]]:
    """The weight files."""
    held = dict.fromkeys(checkpoint.files, 0)
    for info in checkpoint.tensors.values():
        held[info.file] += 1
    return [
        {"file": path.name, "bytes": path.stat().st_size, "tensors": number}
        for path, number in held.items()
    ]


def provenance(folder: Path) -> dict[str, Any] | None:
    """What our own report in the folder says of its origin, if there is one."""
    if not (folder / REPORT).is_file():
        return None
    report: Mapping[str, Any] = read_json(contained(folder, REPORT))
    if not isinstance(report.get("fingerprint"), str):
        return None  # somebody else's report.json
    return {key: report[key] for key in PROVENANCE if key in report}


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _NUMBER.split(name)]


def count(shape: Iterable[int]) -> int:
    """Elements of a shape."""
    found = 1
    for size in shape:
        found *= size
    return found
