"""The small files of an output folder: config, what is carried over, and their records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .checkpoint.commit import Staging
from .checkpoint.formats import ADAPTER, FORMATS, format_of
from .checkpoint.hub import PATTERNS
from .checkpoint.layout import Shard
from .checkpoint.place import REPORT
from .checkpoint.reader import contained, file_digest
from .checkpoint.torch_archive import write_archive
from .plan import Plan
from .sources import Source

TERMS = ("LICENSE*", "NOTICE*")
CARRIED = (*PATTERNS, *TERMS)
OWN = frozenset(
    {REPORT, "README.md", "rank_plan.json", *(found.config for found in FORMATS.values())}
)
"""Files that every output has anew."""


def carried_files(folder: Path) -> dict[str, Path]:
    """Tokenizer, generation settings, licence: files of the source that the output needs unchanged.

    Of an adapter only its terms: everything else belongs to the base model or to its training.

    Raises:
        InputError: one of them is a link out of the folder.
    """
    found = {}
    wanted = TERMS if format_of(folder) == ADAPTER else CARRIED
    for path in sorted(folder.iterdir()):
        name = path.name
        weights = fnmatch(name, "*.safetensors") or fnmatch(name, "*.index.json")
        if weights or name in OWN or path.is_dir() or name.startswith("."):
            continue
        if any(fnmatch(name, pattern) for pattern in wanted):
            found[name] = contained(folder, name)
    return found


def carried_from_all(folders: Sequence[Path]) -> dict[str, bytes]:
    """Contents by name: all of the first source's, and the licences and notices of the others.

    Where two differ under one name, the later one gets its source's position, such as ``NOTICE.2``.
    """
    found = {name: path.read_bytes() for name, path in carried_files(folders[0]).items()}
    for position, folder in enumerate(folders[1:], start=2):
        for name, path in carried_files(folder).items():
            data = path.read_bytes()
            if any(fnmatch(name, pattern) for pattern in TERMS) and found.get(name) != data:
                found[f"{name}.{position}" if name in found else name] = data
    return found


def config_bytes(config: Mapping[str, object], *, own_code: bool = False) -> bytes:
    """``config.json`` as transformers writes it: sorted, two spaces, a final newline.

    Args:
        own_code: the output carries model code of ours, so its ``auto_map`` stays; a source's never does.
    """
    dropped = {"_name_or_path"} if own_code else {"auto_map", "_name_or_path"}
    written = {key: value for key, value in config.items() if key not in dropped}
    return (json.dumps(written, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def sources_record(
    given: Sequence[str], sources: Sequence[Source], digests: Mapping[Path, str]
) -> list[dict[str, Any]]:
    """What the report says of each input."""
    return [
        {
            "path": path,
            "model_type": source.label,
            "files": {
                file.name: digest
                for file, digest in digests.items()
                if file.parent == source.folder
            },
        }
        for path, source in zip(given, sources, strict=True)
    ]


def write_archives(
    plan: Plan, staging: Staging, between: Callable[[], None]
) -> dict[str, dict[str, object]]:
    """Write the planned files that hold a shard's tensors once more; a resumed run writes them again.

    Args:
        between: called after every piece; may raise to stop.

    Returns:
        SHA-256 and size of each, and the shard it was made of.
    """
    found: dict[str, dict[str, object]] = {}
    for name, shard in plan.archives:
        path = staging.place(name)
        write_archive(staging.path / shard, path, between)
        found[name] = {"sha256": file_digest(path), "bytes": path.stat().st_size, "of": shard}
    return found


def output_record(
    plan: Plan,
    shards: Sequence[Shard],
    hashes: Mapping[str, str],
    small: Mapping[str, bytes],
    archives: Mapping[str, dict[str, object]],
) -> dict[str, Any]:
    """What the report says of the output, itself excepted.

    Of an archive, ``of`` names the shard whose tensors it holds as well.
    """
    files: dict[str, dict[str, object]] = {
        shard.file: {"sha256": hashes[shard.file], "bytes": shard.size} for shard in shards
    }
    for name, data in small.items():
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    files |= archives
    return {"files": files, "tensors": len(plan.tensors), "bytes": plan.bytes}
