"""The one seam through which every effect on the file system goes.

Each function makes one system call (or a stated handful) and announces it to `_before` first, so
that a test can fail, or kill the process at, the k-th effect of a run. Every `OSError` becomes a
`RefusedError` here and nowhere else. Files get mode 0666 and folders 0777, less the umask.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ..errors import RefusedError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

COPY_BYTES = 8 << 20
"""Bytes held in memory while a file is copied."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_BINARY: int = getattr(os, "O_BINARY", 0)
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_SEEK = threading.Lock()


def _before(effect: str, path: Path) -> None:
    """Called right before each effect; tests put their own function here."""


@contextmanager
def _effect(effect: str, path: Path, need: int | None = None) -> Iterator[None]:
    """Announce an effect, and turn the `OSError` of the block into a `RefusedError`."""
    try:
        _before(effect, path)
        yield
    except OSError as error:
        raise _refusal(effect, path, error, need) from error


def _refusal(effect: str, path: Path, error: OSError, need: int | None) -> RefusedError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        message = f"disk full at {effect} of {path} ({reason})"
        if need is not None:
            message += f": {need:,} bytes needed"
        with suppress(OSError):
            message += f", {shutil.disk_usage(path.parent).free:,} free"
        return RefusedError(message, hint="free disk space or choose an output on another disk")
    if error.errno in _FORBIDDEN:
        hint = "check the owner, the mode and the mount of that place"
        return RefusedError(f"no permission for {effect} of {path}: {reason}", hint=hint)
    return RefusedError(f"the file system failed at {effect} of {path}: {reason}")


def mkdir(path: Path) -> None:
    """Create one folder whose parent exists."""
    with _effect("mkdir", path):
        os.mkdir(path)


def ensure_dir(path: Path) -> None:
    """Create a folder whose parent exists, unless it is there."""
    if not path.is_dir():
        mkdir(path)
        fsync_dir(path.parent)


def open_write(path: Path, *, create: bool, truncate: bool = False) -> int:
    """A descriptor to read and write ``path``; with ``create`` the file need not exist yet."""
    flags = os.O_RDWR | _BINARY
    flags |= (os.O_CREAT if create else 0) | (os.O_TRUNC if truncate else 0)
    with _effect("create" if create else "open", path):
        return os.open(path, flags, 0o666)


def try_lock(fd: int, path: Path) -> bool:
    """Take the exclusive lock of an open file; False if another process holds it.

    The lock is no effect of its own: it lasts only as long as the descriptor.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        raise _refusal("lock", path, error, None) from error
    return True


def fallocate(fd: int, size: int, path: Path) -> None:
    """Make an empty file ``size`` bytes long and reserve the blocks for them.

    Where the file system cannot reserve, the file is only lengthened, after a look at the free
    space. A full disk so shows before the work and not after it.
    """
    if size == 0:
        return
    with _effect("fallocate", path, size):
        if not _reserve(fd, size):
            if shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(fd, size)


def _reserve(fd: int, size: int) -> bool:
    # Not os.posix_fallocate: where the kernel cannot reserve, glibc writes into every block.
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if call is None:
        return False
    while call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def pwrite(fd: int, data: memoryview | bytes, offset: int, path: Path) -> None:
    """Write all of ``data`` (contiguous bytes) at a byte offset; safe from several threads."""
    view = memoryview(data)
    while len(view):
        with _effect("pwrite", path, len(view)):
            done = _pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def _pwrite(fd: int, view: memoryview, offset: int) -> int:
    if sys.platform != "win32":
        return os.pwrite(fd, view, offset)
    with _SEEK:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def truncate(fd: int, size: int, path: Path) -> None:
    """Cut or lengthen an open file to ``size`` bytes."""
    with _effect("truncate", path, size):
        os.ftruncate(fd, size)


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Ask the kernel to begin writing a range to the disk now, without waiting.

    Only a hint: it makes the later fdatasync short. Systems without it, and failures, are ignored; the
    fdatasync reports what went wrong.
    """
    call = _sync_file_range()
    if call is not None:
        call(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


_SYNC_FILE_RANGE_WRITE = 2


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is None:
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    found: Callable[[int, int, int, int], int] = call
    return found


def fsync(fd: int, path: Path) -> None:
    """Wait until the data and the metadata of an open file are on the disk."""
    with _effect("fsync", path):
        _flush(fd)


def fdatasync(fd: int, path: Path) -> None:
    """Wait until the data of an open file is on the disk."""
    with _effect("fdatasync", path):
        if sys.platform == "linux":
            os.fdatasync(fd)
        else:
            _flush(fd)


def _flush(fd: int) -> None:
    if sys.platform == "darwin":
        # fsync of macOS stops at the cache of the drive.
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def fsync_file(path: Path) -> None:
    """`fsync` of a file by its name."""
    fd = open_write(path, create=False)
    try:
        fsync(fd, path)
    finally:
        os.close(fd)


def fsync_dir(path: Path) -> None:
    """Wait until the entries of a folder are on the disk; nothing on Windows, which cannot."""
    with _effect("fsync_dir", path):
        if sys.platform == "win32":
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _flush(fd)
        finally:
            os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Rename a file or folder; an empty folder at ``target`` is replaced."""
    if sys.platform == "win32" and target.is_dir():
        rmdir(target)
    with _effect("rename", target):
        os.rename(source, target)


def exchange(new: Path, old: Path, aside: Path) -> Path:
    """Let ``new`` take the place of ``old`` in one step; returns where ``old`` is now.

    Linux swaps the two names. Where it cannot, ``old`` is renamed to ``aside`` and ``new`` to
    ``old``; a process killed between the two leaves no ``old``, and ``aside`` holds what it was.
    """
    if _try_exchange(new, old):
        return new
    rename(old, aside)
    try:
        rename(new, old)
    except RefusedError:
        rename(aside, old)
        raise
    return aside


def _try_exchange(new: Path, old: Path) -> bool:
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    with _effect("exchange", old):
        names = (os.fsencode(new), _AT_FDCWD, os.fsencode(old))
        if call(_AT_FDCWD, *names, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
            return True
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code))


def unlink(path: Path) -> None:
    """Remove a file or a symbolic link."""
    with _effect("unlink", path):
        os.unlink(path)


def rmdir(path: Path) -> None:
    """Remove an empty folder."""
    with _effect("rmdir", path):
        os.rmdir(path)


def rmtree(path: Path) -> None:
    """Remove a folder and all in it, entry by entry, following no symbolic link."""
    if sys.platform == "win32":
        with _effect("rmtree", path):
            shutil.rmtree(path)
        return

    def fail(error: OSError) -> None:
        raise _refusal("listing", path, error, None) from error

    # Removal relative to open folders: nobody can swap a symbolic link in on the way.
    for root, folders, files, fd in os.fwalk(path, topdown=False, onerror=fail):
        for name in sorted(folders):
            with _effect("rmdir", Path(root, name)):
                try:
                    os.rmdir(name, dir_fd=fd)
                except NotADirectoryError:  # a link to a folder
                    os.unlink(name, dir_fd=fd)
        for name in sorted(files):
            with _effect("unlink", Path(root, name)):
                os.unlink(name, dir_fd=fd)
    rmdir(path)


def write_file(path: Path, data: bytes) -> None:
    """Create or replace a file with ``data`` and wait until it is on the disk."""
    fd = open_write(path, create=True, truncate=True)
    try:
        pwrite(fd, data, 0, path)
        fsync(fd, path)
    finally:
        os.close(fd)


def copy_file(source: Path, target: Path) -> None:
    """Copy the bytes of a file, not its mode, and wait until they are on the disk."""
    with _reading(source) as reader:
        fd = open_write(target, create=True, truncate=True)
        try:
            at = 0
            while chunk := reader.read(COPY_BYTES):
                pwrite(fd, chunk, at, target)
                at += len(chunk)
            fsync(fd, target)
        finally:
            os.close(fd)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", buffering=0) as reader:
            yield reader
    except OSError as error:
        raise _refusal("reading", path, error, None) from error
