"""A checkpoint folder as names, types and shapes, and lazy reads of what lies behind them.

Opening a checkpoint reads its config, index and headers only. Weights are read with ``pread``: a file
that shrinks under us is an error and not a signal, and resident memory is what we hold, not what we touched.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from ..errors import InputError
from .dtypes import torch_dtype
from .finite import first_non_finite
from .formats import MODEL, Format, refuse_other
from .header import TensorInfo, read_header, read_json

if TYPE_CHECKING:
    import torch

    from .region import Region

CHUNK = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """The readable facts of one folder.

    Attributes:
        folder: the folder, as given.
        config: the parsed ``config.json``, or what the format has in its place.
        tensors: every stored tensor by name.
        files: the weight files, sorted by name.
        format: how the folder is laid out.
    """

    folder: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    format: Format = MODEL

    @property
    def inputs(self) -> list[Path]:
        """Config and weight files: what the function of the checkpoint depends on."""
        return [self.folder / self.format.config, *self.files]


def open_checkpoint(folder: Path, format: Format = MODEL) -> Checkpoint:
    """Read config, index and headers of a folder, refusing anything ambiguous or unsafe.

    Raises:
        InputError: no such folder, no safetensors weights, or any defect found in them.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder",
            hint="give a folder with config.json and safetensors files, or a Hub id owner/name",
        )
    if format is MODEL:
        refuse_other(folder)
    config = read_json(contained(folder, format.config))
    tensors, files = _weights(folder, format)
    return Checkpoint(folder, config, tensors, files, format)


def contained(folder: Path, name: str) -> Path:
    """The path of a plain file of a folder.

    A name that is not one component on every operating system is refused, and so is a link that leads out of
    the folder; the Hub cache, whose snapshots are links into the blobs beside them, is the one exception.

    Raises:
        InputError: the name or the link leads outside.
    """
    windows = PureWindowsPath(name)
    if (
        not name
        or name in {".", ".."}
        or windows.drive
        or windows.root
        or len(windows.parts) != 1
        or any(character in name for character in "/\\:\0")
    ):
        raise InputError(f"{folder}: file name {name!r} points outside the folder")
    path = folder / name
    if not path.exists():
        if path.is_symlink():
            raise InputError(f"{path}: is a link to a file that does not exist")
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    resolved = path.resolve()
    root = folder.resolve()
    allowed = [root]
    # A repository of several folders has them below its snapshot.
    for place in root.parents:
        if place.name == "snapshots" and (place.parent / "blobs").is_dir():
            allowed.append(place.parent / "blobs")
            break
    if not any(resolved.is_relative_to(place) for place in allowed):
        raise InputError(
            f"{path}: is a link to {resolved}, outside the folder",
            hint="copy the file into the folder",
        )
    return path


def _weights(folder: Path, format: Format) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    has_single = (folder / format.single).exists()
    has_index = format.sharded and (folder / format.index).exists()
    if has_index and has_single:
        raise InputError(
            f"{folder}: holds both {format.single} and {format.index}, and loaders disagree which one counts",
            hint="remove the stale one",
        )
    if has_single:
        path = contained(folder, format.single)
        return read_header(path), (path,)
    if has_index:
        return _sharded(folder, format)
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles:
        raise InputError(
            f"{folder}: has no safetensors weights, only pickles ({', '.join(pickles[:3])}), "
            "which can run code when opened and are never read",
            hint="convert on a machine you trust: load with transformers, then save_pretrained",
        )
    if not format.sharded:
        raise InputError(f"{folder}: has no {format.single}")
    raise InputError(f"{folder}: has neither {format.single} nor {format.index}")


def _sharded(folder: Path, format: Format) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    index_path = contained(folder, format.index)
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path}: weight_map is missing or empty")
    by_file: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise InputError(f"{index_path}: tensor {name!r} is mapped to {file!r}, no safetensors")
        by_file.setdefault(file, []).append(name)
    paths = {file: contained(folder, file) for file in sorted(by_file)}
    tensors: dict[str, TensorInfo] = {}
    for file, path in paths.items():
        header = read_header(path)
        for name in by_file[file]:
            if name not in header:
                raise InputError(f"{path}: tensor {name!r} is in the index but not in the file")
        for name, info in header.items():
            if weight_map.get(name) != file:
                raise InputError(
                    f"{path}: holds tensor {name!r}, which the index places in "
                    f"{weight_map.get(name)!r}"
                )
            tensors[name] = info
    return tensors, tuple(paths.values())


class TensorReader:
    """Reads tensors of a checkpoint by region. Safe to share between threads.

    Every floating tensor is checked for NaN and infinity as it is read: a weight that is not finite would
    silently spread through an average, so it is an error that names the tensor.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self, name: str) -> TensorInfo:
        try:
            return self.checkpoint.tensors[name]
        except KeyError:
            raise InputError(f"{self.checkpoint.folder}: tensor {name!r} is missing") from None

    def read_into(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        """Fill ``out`` (bytes) from byte ``offset`` of the tensor, and check it for NaN and infinity.

        Raises:
            InputError: the file is shorter than its header says, or a value is not finite.
        """
        descriptor = self._descriptor(info.file)
        position, total = 0, len(out)
        while position < total:
            got = os.preadv(descriptor, [out[position:]], info.begin + offset + position)
            if got == 0:
                raise InputError(f"{info.file}: ended inside tensor {info.name!r}")
            position += got
        bad = first_non_finite(out, info.dtype)
        if bad is not None:
            where = offset * 8 // max(1, 8 * info.nbytes // max(1, _count(info.shape))) + bad
            raise InputError(
                f"{info.file}: tensor {info.name!r} has a value that is not finite "
                f"(element {where} of {_count(info.shape)})",
                hint="the checkpoint is damaged or its training diverged; nothing was written",
            )

    def read(self, region: Region) -> torch.Tensor:
        """The region as a contiguous tensor of the stored type and of shape ``region.shape``."""
        import torch

        info = self.info(region.tensor)
        size = info.nbytes // max(1, _count(info.shape))
        first, count = region.span()
        flat = torch.empty(count, dtype=torch_dtype(info.dtype))
        if count:
            self.read_into(info, first * size, flat.view(torch.uint8).numpy().data)
        if region.contiguous:
            return flat.view(region.shape)
        return flat.as_strided(region.shape, region.strides).contiguous()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error.strerror})") from error
            return self._descriptors[path]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    try:
        with path.open("rb", buffering=0) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
