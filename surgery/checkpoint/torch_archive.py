"""The tensors of a safetensors file as a file that ``torch.load(weights_only=True)`` reads, written piece by piece.

Some loaders read nothing else. Such a file is a zip archive of stored, uncompressed records:

    archive/data.pkl     a pickled dict, name to tensor, that holds no numbers and names no code but torch's own
    archive/byteorder    little
    archive/data/<n>     the bytes of the n-th tensor, beginning at a multiple of 64
    archive/version      3

The pickle is made of stand-ins, and bytes go from file to file in pieces, so that no tensor is held. Nothing in it
depends on time or machine: equal tensors give equal bytes. Unlike ``torch.save``, no random identifier is stored.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import fs
from .dtypes import torch_dtype
from .header import TensorInfo, read_header
from .layout import TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALIGNMENT = 64
"""Bytes to whose multiples torch aligns storages, so that they can be mapped into memory."""
PIECE = 1 << 20
"""Bytes held while tensors are copied."""
STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
}
"""Types that have a storage class of their own, which every version of torch reads; the others name their type."""
_RECORD_BYTES = 512
"""More than what a tensor costs beside its bytes and its name: two headers, padding, its lines of the pickle."""
_ZIP64_BYTES = 20
"""What a record of more than 2 GiB has in its header for its sizes."""


def most_bytes(specs: Iterable[TensorSpec]) -> int:
    """An upper bound of the file's size."""
    return sum(
        _RECORD_BYTES + 16 * len(spec.shape) + 2 * len(spec.name.encode()) + spec.nbytes
        for spec in specs
    ) + (8 << 10)


def write_archive(source: Path, target: Path, between: Callable[[], None] = lambda: None) -> None:
    """Write the tensors of one file into another, in the order of their bytes.

    Args:
        source: a complete safetensors file.
        target: created or replaced, and on the disk afterwards.
        between: called after every piece; may raise to stop.

    Raises:
        InputError: the source cannot be read, or has a type that torch lacks.
        RefusedError: the disk is full or the file system fails.
    """
    tensors = sorted(read_header(source).values(), key=lambda info: (info.begin, info.name))
    pickled = _pickled(tensors)
    fd = fs.open_write(target, create=True, truncate=True)
    try:
        sink: Any = _Sink(fd, target)
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:
            _store(archive, sink, "data.pkl", len(pickled), [pickled])
            _store(archive, sink, "byteorder", 6, [b"little"])
            for index, info in enumerate(tensors):
                pieces = _pieces(info, between)
                _store(archive, sink, f"data/{index}", info.nbytes, pieces)
            _store(archive, sink, "version", 2, [b"3\n"])
        fs.fsync(fd, target)
    finally:
        os.close(fd)


def difference(source: Path, archive: Path) -> str | None:
    """How the tensors of an archive, as torch loads them, differ from those of a safetensors file; None if not at all.

    Both files are mapped: one tensor at a time is compared.
    """
    import torch
    from safetensors import safe_open

    try:
        loaded = torch.load(archive, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        return f"torch does not load it ({error})"
    with safe_open(source, framework="pt") as stored:
        names = set(stored.keys())
        if names != set(loaded):
            return f"it lacks or adds {sorted(names ^ set(loaded))[:3]}"
        for name in sorted(names):
            expected, found = stored.get_tensor(name), loaded[name]
            if expected.dtype != found.dtype or expected.shape != found.shape:
                return f"{name} is {found.dtype} {list(found.shape)}"
            flat = (tensor.reshape(-1).view(torch.uint8) for tensor in (expected, found))
            if not torch.equal(*flat):
                return f"{name} has other values"
    return None


class _Sink(io.RawIOBase):
    """A file for `zipfile` whose every effect goes through `fs`."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd, self._path, self._at = fd, path, 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        # The archive's writer goes back to a record's header once it knows the checksum, and to no other place.
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("only absolute positions")
        self._at = offset
        return offset

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        fs.pwrite(self._fd, view, self._at, self._path)
        self._at += len(view)
        return len(view)


def _store(
    archive: zipfile.ZipFile, sink: _Sink, name: str, size: int, pieces: Iterable[bytes]
) -> None:
    """One record, whose bytes begin at a multiple of the alignment."""
    entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    entry.create_system = 0  # otherwise that of the machine
    entry.external_attr = 0o600 << 16
    entry.file_size = size
    large = size * 1.05 > zipfile.ZIP64_LIMIT
    begin = sink.tell() + 30 + len(entry.filename) + (_ZIP64_BYTES if large else 0)
    padding = -(begin + 4) % ALIGNMENT
    # An extra field that every reader skips, as torch pads.
    entry.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    with archive.open(entry, "w", force_zip64=large) as record:
        for piece in pieces:
            record.write(piece)
    entry.extra = b""  # the table of contents needs no padding


def _pieces(info: TensorInfo, between: Callable[[], None]) -> Iterable[bytes]:
    try:
        with open(info.file, "rb", buffering=0) as reader:
            reader.seek(info.begin)
            left = info.nbytes
            while left:
                piece = reader.read(min(PIECE, left))
                if not piece:
                    raise InputError(f"{info.file} ends early, within tensor {info.name!r}")
                left -= len(piece)
                yield piece
                between()
    except OSError as error:
        raise InputError(f"{info.file} cannot be read back: {error.strerror}") from error


@dataclass(frozen=True)
class _Tensor:
    """Stands for a tensor in the pickle."""

    info: TensorInfo
    index: int

    @property
    def strides(self) -> tuple[int, ...]:
        found, step = [], 1
        for size in reversed(self.info.shape):
            found.append(step)
            step *= max(size, 1)
        return tuple(reversed(found))


@dataclass(frozen=True)
class _Storage:
    """Stands for the bytes of a tensor."""

    tensor: _Tensor

    def identity(self) -> tuple[object, ...]:
        """What torch asks its archive for: class, record, place and number of elements (bytes of untyped ones)."""
        import torch

        info = self.tensor.info
        kind = STORAGES.get(info.dtype)
        size = torch_dtype(info.dtype).itemsize if kind else 1
        found: Any = getattr(torch, kind) if kind else torch.UntypedStorage
        return "storage", found, str(self.tensor.index), "cpu", info.nbytes // size


class _Pickler(pickle.Pickler):
    """Writes stand-ins as what torch would have written for what they stand for."""

    def persistent_id(self, obj: object) -> tuple[object, ...] | None:
        return obj.identity() if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, _Tensor):
            return NotImplemented
        import torch._utils as rebuild

        hooks: OrderedDict[str, object] = OrderedDict()
        common = (_Storage(obj), 0, obj.info.shape, obj.strides, False, hooks)
        if obj.info.dtype in STORAGES:
            return rebuild._rebuild_tensor_v2, common
        return rebuild._rebuild_tensor_v3, (*common, torch_dtype(obj.info.dtype))


def _pickled(tensors: Sequence[TensorInfo]) -> bytes:
    """The dict of names and tensors, in the protocol that torch's restricted reader knows."""
    buffer = io.BytesIO()
    found = {info.name: _Tensor(info, index) for index, info in enumerate(tensors)}
    _Pickler(buffer, protocol=2).dump(found)
    return buffer.getvalue()
