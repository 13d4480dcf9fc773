"""Strict reading of safetensors headers and of the JSON files beside them.

The safetensors library accepts some files that other parsers read differently (a duplicated key, unknown
fields, leading spaces) and names no file in its errors; everything ambiguous is refused here, by name.
Only headers are read: no tensor byte is touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .dtypes import BITS, nbytes

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_JSON_BYTES = 64_000_000
"""Largest config, index or report that is read."""

LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True)
class TensorInfo:
    """Where one stored tensor lies. ``begin`` and ``end`` are absolute byte offsets in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file: strict (no duplicate keys, no NaN), bounded in size.

    Raises:
        InputError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {size} bytes of JSON, more than the limit {MAX_JSON_BYTES}")
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> dict[str, object]:
    """A JSON object from bytes; ``where`` names them in errors."""
    if raw.startswith(LFS_MAGIC):
        raise InputError(
            f"{where}: is a Git LFS pointer, not the file itself", hint="run `git lfs pull` there"
        )
    try:
        found = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} occurs twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in file order.

    Raises:
        InputError: anything but a well-formed header whose tensors cover the file exactly.
    """
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(len(LFS_MAGIC))
            if head.startswith(LFS_MAGIC):
                raise InputError(
                    f"{path}: is a Git LFS pointer, not the weights themselves",
                    hint="run `git lfs pull` in that folder",
                )
            if size < 8:
                raise InputError(f"{path}: {size} bytes, too short for a safetensors file")
            length = int.from_bytes(head[:8], "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(
                    f"{path}: claims a header of {length} bytes, the format allows "
                    f"{MAX_HEADER_BYTES}; this is no safetensors file"
                )
            if 8 + length > size:
                raise InputError(
                    f"{path}: truncated inside its header (needs {8 + length} bytes, has {size})"
                )
            stream.seek(8)
            raw = stream.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: its header does not begin with a brace")
    return _tensors(path, parse_json(raw, f"{path}: header"), 8 + length, size)


def _tensors(
    path: Path, header: Mapping[str, object], start: int, size: int
) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise InputError(f"{path}: its metadata must map text to text")
            continue
        found[name] = _tensor(path, name, entry, start)
    ordered = sorted(found.values(), key=lambda info: (info.begin, info.end))
    position = start
    for info in ordered:
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a hole"
            raise InputError(
                f"{path}: tensor {info.name!r} {fault} (begins at byte {info.begin}, "
                f"expected {position})"
            )
        position = info.end
    if position != size:
        fault = "truncated" if position > size else "has bytes after its last tensor"
        raise InputError(f"{path}: {fault} (tensors end at byte {position}, file has {size})")
    return {info.name: info for info in ordered}


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not name:
        raise InputError(f"{path}: a tensor has an empty name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InputError(f"{where}: unknown type {dtype!r}")
    if not _sizes(shape):
        raise InputError(f"{where}: shape {shape!r} is no list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets {offsets!r} are no byte range")
    try:
        expected = nbytes(dtype, tuple(shape))
    except InputError as error:
        raise InputError(f"{where}: {error.message}") from error
    if offsets[1] - offsets[0] != expected:
        raise InputError(
            f"{where}: {dtype} {shape} needs {expected} bytes, its offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(name, dtype, tuple(shape), path, start + offsets[0], start + offsets[1])


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 63 for item in value
    )
