"""Where every tensor goes, decided before any weight is read: shards, headers and byte offsets.

The bytes follow `safetensors.torch.save_file(tensors, metadata={"format": "pt"})` exactly, so that
a checkpoint written here cannot be told from one written by the reference library. The header is
built by hand because the library needs all tensors of a shard in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import InputError, RefusedError, UsageError
from . import dtypes

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library refuses to read a longer header."""

_METADATA = '"__metadata__":{"format":"pt"}'


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, the header's name of its type, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk; raises InputError as `dtypes.nbytes` does."""
        return dtypes.nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One planned safetensors file.

    Args:
        file: the plain file name.
        header: the first bytes of the file: 8 bytes of length, the JSON text, its padding.
        begin: byte offset of each tensor, counted from the start of the file, in file order.
        size: bytes of the whole file.
    """

    file: str
    header: bytes
    begin: dict[str, int]
    size: int

    @cached_property
    def end(self) -> dict[str, int]:
        """Byte offset one past each tensor: where the next tensor of the file begins."""
        starts = [*self.begin.values(), self.size]
        return dict(zip(self.begin, starts[1:], strict=True))


def lay_out(
    specs: Sequence[TensorSpec], *, max_shard_bytes: int = 5_000_000_000, stem: str = "model"
) -> list[Shard]:
    """Spread tensors over shards, filling each before the next is begun, in the given order.

    A tensor is never split: one larger than ``max_shard_bytes`` gets a shard of its own. Inside a
    shard the tensors are ordered as safetensors orders them. No tensors give one empty shard.

    Args:
        specs: the tensors, in the order in which they fill the shards.
        max_shard_bytes: most bytes of tensor data in a shard; headers are not counted.
        stem: one shard is called ``<stem>.safetensors``, N are
            ``<stem>-00001-of-0000N.safetensors`` and so on.

    Raises:
        UsageError: ``max_shard_bytes`` is not positive.
        InputError: two tensors have one name, or a name, type or shape cannot be stored.
        RefusedError: a header would pass the 100 MB that safetensors reads.
    """
    if max_shard_bytes < 1:
        raise UsageError(f"the shard size must be at least 1 byte, found {max_shard_bytes}")
    seen: set[str] = set()
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        _check_name(spec.name)
        if spec.name in seen:
            raise InputError(f"tensor {spec.name!r} is planned twice; names must be distinct")
        seen.add(spec.name)
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return [_shard(f"{stem}.safetensors", groups[0])]
    return [
        _shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def index_json(shards: Sequence[Shard], folder: str = "") -> bytes:
    """The text of ``model.safetensors.index.json`` as transformers writes it, in UTF-8.

    Args:
        folder: ``<name>/`` before the names and files of a shelf's member, which its index leaves out.
    """
    index = {
        "metadata": {"total_size": sum(shard.size - len(shard.header) for shard in shards)},
        "weight_map": {
            name.removeprefix(folder): shard.file.removeprefix(folder)
            for shard in shards
            for name in shard.begin
        },
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _check_name(name: str) -> None:
    if name == "__metadata__":
        raise InputError("a tensor cannot be named '__metadata__': safetensors reserves that name")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"tensor name {name!r} is not valid Unicode text: {error.reason}"
        ) from None


def _shard(file: str, specs: Sequence[TensorSpec]) -> Shard:
    # Code points and UTF-8 bytes sort alike, so `str` order is the order of the Rust library.
    ordered = sorted(specs, key=lambda spec: (-dtypes.RANK[spec.dtype], spec.name))
    entries = [_METADATA]
    relative: dict[str, int] = {}
    at = 0
    for spec in ordered:
        relative[spec.name] = at
        entries.append(_entry(spec, at))
        at += spec.nbytes
    text = ("{" + ",".join(entries) + "}").encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise RefusedError(
            f"the header of {file} would take {len(text):,} bytes for {len(ordered):,} tensors, "
            f"but safetensors reads at most {MAX_HEADER_BYTES:,}",
            hint="choose a smaller shard size",
        )
    header = len(text).to_bytes(8, "little") + text
    begin = {name: len(header) + offset for name, offset in relative.items()}
    return Shard(file=file, header=header, begin=begin, size=len(header) + at)


def _entry(spec: TensorSpec, at: int) -> str:
    # `ensure_ascii=False` escapes just what serde escapes: quote, backslash and control characters.
    name = json.dumps(spec.name, ensure_ascii=False)
    shape = ",".join(map(str, spec.shape))
    offsets = f"{at},{at + spec.nbytes}"
    return f'{name}:{{"dtype":"{spec.dtype}","shape":[{shape}],"data_offsets":[{offsets}]}}'
