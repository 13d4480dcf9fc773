"""What a folder is, of all that moesurg reads or writes: chooses who tells it, and looks into folders of folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import inspection, shelves
from .adapters.adapter import Adapter
from .calibration.statistics import JSON_FILE
from .checkpoint.commit import STAGED
from .checkpoint.formats import ADAPTER, MODEL, PACK, SHELF, format_of
from .checkpoint.header import read_json
from .checkpoint.hub import resolve
from .checkpoint.reader import contained, open_checkpoint
from .errors import InputError, UsageError
from .inspection_adapter import inspect_adapter
from .inspection_facts import count, natural, provenance
from .inspection_pack import inspect_pack
from .inspection_statistics import FORMAT as STATISTICS
from .inspection_statistics import inspect_statistics
from .progress import Progress, Silent
from .sweep import MANIFEST

Record = dict[str, Any]

MARKS = (PACK.config, SHELF, ADAPTER.config, MODEL.config)
"""Files that tell what a folder is."""
CLAIMS = (*MARKS, MODEL.single, MODEL.index, ADAPTER.single)
"""Files by which a folder claims to be of a format, complete or not."""
HELD = (*CLAIMS, MANIFEST, JSON_FILE)


def inspect(
    sources: Sequence[str],
    *,
    calibration: Path | None = None,
    weights: bool = False,
    layout: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The facts of a source, or ``sources`` with those of several and, of adapters, ``cosines``.

    Args:
        sources: folders or Hub ids.
        calibration: a statistics folder of the only source, a mixture.
        weights: whether the changes of adapters are measured, which reads their factors.
        layout: of stacked experts' second factors, where it cannot be told.
        progress: told of what takes time.

    Raises:
        UsageError: options that do not belong together.
        InputError: a source is bad, or is not of the kind that an option is for.
    """
    shown = progress or Silent()
    if layout is not None and not weights:
        raise UsageError(
            "--expert-layout says how stacked experts are read, and nothing is read without --weights",
            hint="add --weights",
        )
    if calibration is not None and len(sources) > 1:
        raise UsageError(
            "--calibration is of one model, and several sources are given",
            hint="inspect that model by itself",
        )
    records = [_inspect(source, resolve(source), calibration, shown) for source in sources]
    measured = None
    if weights:
        measured = _measure(records, layout, shown)
    if len(records) == 1:
        return records[0]
    return {"sources": records, **({"cosines": measured} if measured else {})}


def _inspect(source: str, folder: Path, calibration: Path | None, progress: Progress) -> Record:
    """The record of one folder."""
    found = _what(folder)
    if found == MODEL.name:
        return inspection.inspect(source, calibration, progress, folder)
    if calibration is not None:
        raise InputError(f"{folder}: is {_a(found)}, which has no experts to analyse")
    if found == ADAPTER.name:
        return inspect_adapter(source, folder)
    if found == PACK.name:
        return inspect_pack(source, folder)
    if found == STATISTICS:
        return inspect_statistics(source, folder)
    return _of_folders(source, folder, found, progress)


def _a(found: str) -> str:
    """A kind of folder with its article."""
    names = {"adapter": "an adapter", "folders": "a folder of several", STATISTICS: "statistics"}
    names |= {"pack": "a pack", "sweep": "a sweep"}
    return names.get(found, "a shelf")


def _what(folder: Path) -> str:
    """A format's name, ``sweep``, or ``folders``: one that is nothing itself and holds folders that are.

    Raises:
        InputError: nothing that is known.
    """
    if folder.name.endswith(STAGED):
        raise InputError(
            f"{folder}: is what a run has written so far, and no output yet",
            hint="the command of that run with --resume finishes it",
        )
    if any((folder / name).exists() for name in CLAIMS):
        return format_of(folder).name
    if (folder / MANIFEST).exists():
        return "sweep"
    if (folder / JSON_FILE).exists():
        return STATISTICS
    if _inner(folder):
        return "folders"
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    raise InputError(
        f"{folder}: holds {'weights, but ' if weights else ''}none of {', '.join(MARKS)}, nor a folder with one, so "
        "there is nothing to tell",
        hint="give the folder of a model, an adapter, a pack or a shelf",
    )


def _inner(folder: Path) -> list[str]:
    """Folders directly below that claim to be something, sorted; links, hidden and unfinished ones are left aside."""
    try:
        below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from error
    names = [path.name for path in below if any((path / name).exists() for name in HELD)]
    return sorted((name for name in names if name[0] != "." and STAGED not in name), key=natural)


def _of_folders(source: str, folder: Path, found: str, progress: Progress) -> Record:
    """A shelf, a sweep or a plain folder of folders: every member's record, and what their list says."""
    listed: dict[str, Any] = {}
    router = None
    said: dict[str, dict[str, Any]] = {}
    if found == "sweep":
        said, listed = _sweep(folder)
    elif found == "folders":
        said = {name: {} for name in _inner(folder)}
    else:
        listing = shelves.listing(folder)
        said = {name: listing["members"][name] for name in shelves.members(folder)}
        known = ("schema_version", "members")
        listed = {key: value for key, value in listing.items() if key not in known}
        for name in shelves.router(folder):
            router = _router(folder, name)
    members: list[dict[str, Any]] = []
    for name, facts in said.items():
        record = _inspect(str(folder / name), folder / name, None, progress)
        members.append({"folder": name, "facts": facts, "record": record})
    records: list[Record] = [member["record"] for member in members]
    records += [router] if router else []
    row: Record = {
        "format": found,
        "source": source,
        "folder": str(folder),
        "listed": listed,
        "members": members,
        "parameters": {"total": sum(_parameters(record) for record in records)},
        "bytes": sum(record["bytes"] for record in records),
        "tensors": sum(record["tensors"] for record in records),
    }
    if router:
        row["router"] = router
    origin = provenance(folder)
    if origin is not None:
        row["provenance"] = origin
    return row


def _parameters(record: Record) -> int:
    """Parameters of a record; statistics are none."""
    total: int = record["parameters"]["total"] if "parameters" in record else 0
    return total


def _router(folder: Path, name: str) -> dict[str, Any]:
    """What the folder of a router holds; its config is that of the loader that the shelf names."""
    checkpoint = open_checkpoint(folder / name, ADAPTER)
    infos = checkpoint.tensors.values()
    return {
        "folder": name,
        "peft_type": checkpoint.config.get("peft_type"),
        "parameters": {"total": sum(count(info.shape) for info in infos)},
        "bytes": sum(info.nbytes for info in infos),
        "tensors": len(checkpoint.tensors),
    }


def _sweep(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Of a sweep's manifest: what it says of each output, and of the whole.

    Raises:
        InputError: it lists no outputs, or one that is not there.
    """
    manifest = read_json(contained(folder, MANIFEST))
    outputs = manifest.get("outputs")
    if not isinstance(outputs, list) or not outputs:
        raise InputError(f"{folder / MANIFEST}: outputs should be a list of folders with weights")
    said: dict[str, dict[str, Any]] = {}
    for entry in outputs:
        name = entry.get("folder") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{folder / MANIFEST}: outputs has an entry without a folder")
        known = shelves.folder(folder, name, MANIFEST)
        said[known] = {key: value for key, value in entry.items() if key != "folder"}
    kept = ("command", "method", "sources", "sweep")
    return said, {key: manifest[key] for key in kept if key in manifest}


def _measure(
    records: Sequence[dict[str, Any]], layout: str | None, progress: Progress
) -> dict[str, Any] | None:
    """Measure all adapters among the sources or, of one source that is a folder of folders, among its members."""
    from .inspection_weights import measure

    if all(record["format"] == ADAPTER.name for record in records):
        adapters = [Adapter.open(Path(record["folder"])) for record in records]
        return measure(records, adapters, layout, progress)
    for record in records:
        if len(records) > 1 and record["format"] != ADAPTER.name:
            raise InputError(
                f"{record['folder']}: --weights compares adapters, and this is {record['format']}",
                hint="several sources are all adapters, or leave out --weights",
            )
    (record,) = records
    inner = [member["record"] for member in record.get("members", ())]
    inner = [item for item in inner if item["format"] == ADAPTER.name]
    if not inner:
        raise InputError(
            f"{record['folder']}: --weights measures the changes of adapters, and there is none here",
            hint="leave out --weights",
        )
    adapters = [Adapter.open(Path(item["folder"])) for item in inner]
    found = measure(inner, adapters, layout, progress)
    if found is not None:
        record["cosines"] = found
    return None
