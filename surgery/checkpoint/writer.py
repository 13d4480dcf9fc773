"""Write tensors at planned offsets of preallocated shards, in any order, hashing meanwhile."""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import InputError
from . import fs
from .layout import Shard

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    # The type stubs know arrays as buffers only from Python 3.12 on.
    Data = Buffer | NDArray[Any]

WRITEBACK = 1 << 20
"""Bytes written one after the other for which the disk is asked at once: each time costs as much as a small write."""
HASH_BYTES = 4 << 20
"""Bytes read back at a time for the hashes: all the memory that a `Hasher` needs."""


class ShardWriter:
    """Open shards of one folder. Threads may call `write` and `write_strided` at once.

    Args:
        folder: where the shard files are or shall be.
        shards: the plan from `layout.lay_out`.
        create: create every file at its full size, so that a full disk shows before the work, and
            write the headers; otherwise the files exist (worker processes, a resumed run).
            A run that resumes with no finished unit creates them again.

    Raises:
        RefusedError: the disk is full or the file system fails.
        InputError: with ``create=False``, a file is missing or has another size than planned.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], *, create: bool) -> None:
        self.folder = folder
        self._home = {name: shard for shard in shards for name in shard.begin}
        self._fds: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._unasked: dict[str, tuple[int, int]] = {}
        self._guard = threading.Lock()
        try:
            for shard in shards:
                if create:
                    self._create(shard)
                else:
                    _check_size(folder / shard.file, shard.size)
            if create:
                fs.fsync_dir(folder)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, data: Data, *, offset: int = 0) -> None:
        """Write bytes of a tensor, beginning ``offset`` bytes into it.

        Raises:
            ValueError: an unknown tensor, or bytes outside it.
        """
        view = as_bytes(data)
        shard, begin = self._locate(name, offset, len(view))
        self._put(shard.file, [(begin, view)])

    def write_strided(
        self, name: str, offset: int, row_bytes: int, row_stride_bytes: int, data: Data
    ) -> None:
        """Write rows that lie apart, as those of one projection in a fused tensor do.

        Args:
            name: the tensor.
            offset: bytes from the start of the tensor to the first row.
            row_bytes: bytes of a row.
            row_stride_bytes: bytes from the start of a row to the start of the next.
            data: the rows one after the other, without gaps.

        Raises:
            ValueError: an unknown tensor, rows that overlap, a broken last row, or bytes outside.
        """
        view = as_bytes(data)
        if row_bytes < 1 or row_stride_bytes < row_bytes or len(view) % row_bytes:
            raise ValueError(
                f"{len(view)} bytes cannot be rows of {row_bytes} bytes every {row_stride_bytes}"
            )
        if row_stride_bytes == row_bytes or len(view) <= row_bytes:
            self.write(name, view, offset=offset)
            return
        rows = len(view) // row_bytes
        shard, begin = self._locate(name, offset, (rows - 1) * row_stride_bytes + row_bytes)
        pieces = (
            (begin + row * row_stride_bytes, view[row * row_bytes : (row + 1) * row_bytes])
            for row in range(rows)
        )
        self._put(shard.file, pieces)

    def touch(self, names: Iterable[str]) -> None:
        """Count tensors as written, for `sync`: other processes wrote them through their own files."""
        with self._guard:
            for name in names:
                self._descriptor(self._home[name].file)
                self._dirty.add(self._home[name].file)

    def sync(self) -> None:
        """Wait until everything whose `write` has returned is on the disk."""
        with self._guard:
            dirty, self._dirty = sorted(self._dirty), set()
        for file in dirty:
            fs.fdatasync(self._fds[file], self.folder / file)

    def close(self) -> None:
        """Close the files without waiting for the disk. Closing twice is harmless."""
        with self._guard:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _create(self, shard: Shard) -> None:
        path = self.folder / shard.file
        fs.ensure_dir(path.parent)
        fd = self._fds[shard.file] = fs.open_write(path, create=True, truncate=True)
        fs.fallocate(fd, shard.size, path)
        fs.pwrite(fd, shard.header, 0, path)
        self._dirty.add(shard.file)

    def _locate(self, name: str, offset: int, length: int) -> tuple[Shard, int]:
        shard = self._home.get(name)
        if shard is None:
            raise ValueError(f"tensor {name!r} is in no shard of {self.folder}")
        size = shard.end[name] - shard.begin[name]
        if offset < 0 or offset + length > size:
            raise ValueError(
                f"bytes {offset} to {offset + length} of tensor {name!r}, which has {size} bytes"
            )
        return shard, shard.begin[name] + offset

    def _descriptor(self, file: str) -> int:
        # Opened at the first write: a worker touches few of the many shards of a large model.
        if file not in self._fds:
            self._fds[file] = fs.open_write(self.folder / file, create=False)
        return self._fds[file]

    def _put(self, file: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        with self._guard:
            fd = self._descriptor(file)
        for at, piece in pieces:
            fs.pwrite(fd, piece, at, self.folder / file)
            self._ask(file, fd, at, at + len(piece))
        # Only now: marked before, a sync in between would take the mark away without the bytes.
        with self._guard:
            self._dirty.add(file)

    def _ask(self, file: str, fd: int, begin: int, end: int) -> None:
        """Have a range written to the disk meanwhile, together with what was written just before it."""
        ranges = []
        with self._guard:
            start, stop = self._unasked.get(file, (begin, begin))
            if stop != begin:
                ranges.append((start, stop))
                start = begin
            if end - start >= WRITEBACK:
                ranges.append((start, end))
                start = end
            self._unasked[file] = start, end
        for first, last in ranges:
            if first < last:  # a length of zero would mean all the rest of the file
                fs.start_writeback(fd, first, last - first)


class Hasher:
    """SHA-256 of every shard file, computed in one background thread while the run goes on.

    A file is hashed from its start as far as it is complete, by reading it back, mostly from the
    page cache. The headers count as complete at once; all the rest is reported by `done`. A range
    may be reported twice but must not be written again once reported.

    Args:
        folder: where the files are.
        shards: the plan; the files must exist when their first range is reported.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self._home = {name: shard for shard in shards for name in shard.begin}
        self._size = {shard.file: shard.size for shard in shards}
        self._prefix = dict.fromkeys(self._size, 0)
        self._hashed = dict.fromkeys(self._size, 0)
        self._ahead: dict[str, list[tuple[int, int]]] = {file: [] for file in self._size}
        self._sha = {file: hashlib.sha256() for file in self._size}
        self._error: Exception | None = None
        self._finishing = self._closed = False
        self._wake = threading.Condition()
        for shard in shards:
            self.done(shard.file, 0, len(shard.header))
        self._thread = threading.Thread(target=self._run, name="moesurg-hasher", daemon=True)
        self._thread.start()

    def done(self, file: str, begin: int, end: int) -> None:
        """Report that the bytes from ``begin`` up to ``end`` of a file are final."""
        if not 0 <= begin <= end <= self._size[file]:
            raise ValueError(f"bytes {begin} to {end} of {file}, which has {self._size[file]}")
        with self._wake:
            ahead = self._ahead[file]
            heapq.heappush(ahead, (begin, end))
            while ahead and ahead[0][0] <= self._prefix[file]:
                self._prefix[file] = max(self._prefix[file], heapq.heappop(ahead)[1])
            self._wake.notify_all()

    def done_tensor(self, name: str) -> None:
        """Report that all bytes of a tensor are final."""
        shard = self._home[name]
        self.done(shard.file, shard.begin[name], shard.end[name])

    def finish(self) -> dict[str, str]:
        """Wait for all hashes; returns the hexadecimal SHA-256 of each file by its name.

        Raises:
            InputError: a file ended early or could not be read.
            RuntimeError: a range has never been reported.
        """
        with self._wake:
            self._finishing = True
            self._wake.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error
        for file, size in self._size.items():
            if self._hashed[file] < size:
                missing = f"byte {self._hashed[file]} of {file} ({size} bytes)"
                raise RuntimeError(f"{missing} was never reported as written")
        return {file: sha.hexdigest() for file, sha in self._sha.items()}

    def close(self) -> None:
        """Stop the thread, whatever is left to do."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        buffer = memoryview(bytearray(HASH_BYTES))
        try:
            while (file := self._next()) is not None:
                self._hash(file, buffer)
        except Exception as error:
            self._error = error

    def _next(self) -> str | None:
        """A file with complete bytes not yet hashed, waiting for one; None at the end."""
        with self._wake:
            while not self._closed:
                for file, prefix in self._prefix.items():
                    if self._hashed[file] < prefix:
                        return file
                if self._finishing:
                    return None
                self._wake.wait()
        return None

    def _hash(self, file: str, buffer: memoryview) -> None:
        path = self.folder / file
        try:
            with open(path, "rb", buffering=0) as reader:
                reader.seek(self._hashed[file])
                while not self._closed and self._hashed[file] < self._prefix[file]:
                    length = min(self._prefix[file] - self._hashed[file], len(buffer))
                    count = reader.readinto(buffer[:length])
                    if not count:
                        raise InputError(f"{path} ends early, at byte {self._hashed[file]}")
                    self._sha[file].update(buffer[:count])
                    self._hashed[file] += count
        except OSError as error:
            raise InputError(f"{path} cannot be read back: {error.strerror}") from error


def as_bytes(data: Data) -> memoryview:
    """What is written, as bytes."""
    view = memoryview(cast("Buffer", data))
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise InputError(f"the planned shard {path} cannot be used: {error.strerror}") from error
    if found != size:
        raise InputError(
            f"the planned shard {path} has {found:,} bytes where {size:,} were expected",
            hint="--force without --resume begins afresh",
        )
