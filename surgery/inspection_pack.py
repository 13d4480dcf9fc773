"""What a pack is: the inputs that can be taken out of it, and what it costs in bytes and in error."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .checkpoint.formats import PACK
from .checkpoint.header import read_json
from .checkpoint.place import REPORT
from .checkpoint.reader import contained
from .errors import as_written
from .inspection_facts import count, dtypes, provenance, shards
from .methods import load
from .packs import Pack

FRACTIONS = (8, 4, 2, 1)
"""Parts of the kept triplets at which the report of a pack of models holds errors."""


def inspect_pack(source: str, folder: Path) -> dict[str, Any]:
    """The facts of a pack.

    What an input costs by itself (``bytes`` of a task) is what taking it out would write, planned as ``revert`` plans
    it. ``size`` is the pack's part of all that it stands for, in bytes; a base that it holds counts on both sides.

    Raises:
        InputError: the pack is bad, as taking something out of it would find.
    """
    pack = Pack.open(folder)
    tensors = pack.checkpoint.tensors
    with as_written(folder / PACK.config):
        tasks, parts = [_task(pack, task) for task in pack.tasks], _parts(pack)
    with as_written(folder / REPORT):
        curve = _curve(pack)
    held = sum(info.nbytes for info in tensors.values())
    base = sum(info.nbytes for name, info in tensors.items() if _of_base(pack, name))
    record: dict[str, Any] = {
        "format": PACK.name,
        "source": source,
        "folder": str(folder),
        "kind": pack.kind,
        "tasks": tasks,
        "parts": parts,
        "parameters": {"total": sum(count(info.shape) for info in tensors.values())},
        "dtypes": dtypes(pack.checkpoint),
        "bytes": held,
        "base_bytes": base,
        "size": held / max(1, base + sum(task["bytes"] for task in tasks)),
        "tensors": len(tensors),
        "shards": shards(pack.checkpoint),
        "curve": curve,
        "take_out": shlex.join(["moesurg", "revert", source, "--task", pack.names[0]])
        + " -o FOLDER",
        "methods": [
            {"command": "revert", "name": pack.kind, "summary": _method(pack).info.summary}
        ],
    }
    origin = provenance(folder)
    if origin is not None:
        record["provenance"] = origin
    return record


def _method(pack: Pack) -> Any:
    return load("revert", pack.kind, "packs")


def _of_base(pack: Pack, name: str) -> bool:
    return pack.kind == "tsv-c" and name.startswith("base.")


def _task(pack: Pack, task: Mapping[str, Any]) -> dict[str, Any]:
    """One input: what it is and what taking it out gives."""
    method = _method(pack)
    draft = method.plan([pack], method.options(task=task["name"]))
    config = task.get("config") or {}
    named = config.get("base_model_name_or_path") or config.get("model_type")
    return {
        "name": task["name"],
        "format": draft.format,
        "of": named,
        "tensors": len(draft.tensors),
        "bytes": sum(spec.nbytes for spec in draft.tensors),
        "exactness": {"kind": draft.exactness.kind, "reason": draft.exactness.reason},
    }


def _parts(pack: Pack) -> dict[str, Any]:
    """How the modules or matrices are stored: how many with each number of directions or triplets."""
    key = "basis" if pack.kind == "rmm" else "rank"
    sizes = Counter(part.get(key) for part in pack.parts.values())
    found: dict[str, Any] = {
        "count": len(pack.parts),
        "stored_by": "directions" if pack.kind == "rmm" else "triplets",
        "sizes": [
            {"size": size, "parts": number}
            for size, number in sorted(sizes.items(), key=lambda item: (item[0] or 0, item[1]))
        ],
    }
    if pack.kind == "rmm":
        found["forms"] = sorted({part["form"] for part in pack.parts.values()})
        found["exact_factors"] = any("types" in part for part in pack.parts.values())
    return found


def _curve(pack: Pack) -> list[dict[str, Any]] | None:
    """Error against size, from the report of the run that made the pack; None without one.

    Errors are relative, of the changes of weights: root mean square and largest over modules (or matrices). Sizes are
    of those parts of the inputs that are not stored in full, in elements.
    """
    if provenance(pack.folder) is None:
        return None
    units = read_json(contained(pack.folder, REPORT)).get("units")
    if not isinstance(units, Mapping):
        return None
    curves = {
        name: metrics["curve"]
        for name, metrics in units.items()
        if isinstance(metrics, Mapping) and metrics.get("curve")
    }
    if not curves:
        return None
    return _directions(pack, curves) if pack.kind == "rmm" else _triplets(pack, curves)


def _directions(pack: Pack, curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of adapters, by the number of directions that every module would have at most."""
    weights = {
        name: (part["inputs"] + part["outputs"])
        * part["experts"]
        * sum(pack.tasks[task]["ranks"][name] for task in part["tasks"])
        for name, part in pack.parts.items()
    }
    found = []
    for directions in range(max(len(curve) for curve in curves.values())):
        rows = {name: curve[min(directions, len(curve) - 1)] for name, curve in curves.items()}
        size = sum(weights[name] * row[1] for name, row in rows.items())
        total = sum(weights[name] for name in rows)
        errors = [row[2] for row in rows.values()]
        found.append({"directions": directions, "size": size / total, **_errors(errors)})
    return found


def _triplets(pack: Pack, curves: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of models, by the part of the stored triplets that every matrix would keep."""
    found: list[dict[str, Any]] = []
    for divisor in FRACTIONS:
        size = total = 0
        errors = []
        for unit, curve in curves.items():
            _, _, name = unit.partition(".")
            rank = pack.parts[name]["rank"]
            kept = max(1, rank // divisor)
            shape = pack.shape(f"base.{name}")
            size += kept * (shape[-2] + shape[-1]) * math.prod(shape[:-2])
            total += math.prod(shape)
            errors.append(dict(curve)[kept])
        found.append({"part_of_triplets": 1 / divisor, "size": size / total, **_errors(errors)})
    # Parts that come to the same numbers of triplets are one.
    return [
        row for row, other in pairwise([*found, {"size": None}]) if row["size"] != other["size"]
    ]


def _errors(errors: Sequence[float]) -> dict[str, float]:
    mean = math.sqrt(math.fsum(error**2 for error in errors) / len(errors))
    return {"error": mean, "largest_error": max(errors)}
