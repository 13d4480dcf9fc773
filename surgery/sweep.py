"""One method at many weights: a folder of outputs and a manifest that says which is which.

Merging fine-tunes linearly stands in for training on a mixture of their data (arXiv:2602.04937): ranking the merges
ranks the mixtures. The outputs are ordinary ones with a report each, complete or absent; the manifest is written
last, so that a folder with one is complete.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .checkpoint import fs
from .errors import RefusedError, UsageError
from .progress import Progress

if TYPE_CHECKING:
    from .operation import Request

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
MOST = 1000
"""Outputs of one sweep."""
HELP = (
    "instead of --weights: every set of weights on a grid with the sum 1, such as simplex:step=0.25"
)


def run_sweep(request: Request, progress: Progress) -> dict[str, Any]:
    """Run a request once for every set of weights, each into a folder named after them.

    Returns:
        The summary of the last run with ``outputs``: folder and weights of each.

    Raises:
        UsageError: a sweep that is none, or weights beside it.
        RefusedError: the disk has no room for all outputs.
        MoesurgError: what a run raises; outputs that are complete stay.
    """
    from .operation import run

    if request.options.get("weights"):
        raise UsageError("--sweep and --weights exclude each other")
    grid = simplex(str(request.options["sweep"]), len(request.sources))
    plans = [
        (
            "w_" + "_".join(f"{weight:g}" for weight in weights),
            {**request.options, "sweep": None, "weights": ",".join(map(repr, weights))},
        )
        for weights in grid
    ]
    first = dataclasses.replace(request, options=plans[0][1], dry_run=True)
    planned = run(first, progress)
    outputs = [
        {"folder": name, "weights": list(weights)}
        for (name, _), weights in zip(plans, grid, strict=True)
    ]
    total = {"outputs": outputs, "notes": [f"{len(outputs)} outputs", *planned["notes"]]}
    if request.dry_run:
        return planned | total
    if request.output is None:
        raise UsageError("an output folder is needed", hint="-o DIR, or --dry-run to plan only")
    _check_room(request, len(plans) * planned["bytes"])
    if not request.output.exists():
        fs.mkdir(request.output)
    result: dict[str, Any] = {}
    seconds = 0.0
    for name, options in plans:
        target = request.output / name
        result = run(dataclasses.replace(request, options=options, output=target), progress)
        seconds += result["seconds"]
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "command": request.command,
        "method": request.method,
        "sources": list(request.sources),
        "sweep": request.options["sweep"],
        "outputs": outputs,
    }
    staged = request.output / f".{MANIFEST}.tmp"
    fs.write_file(staged, (json.dumps(manifest, indent=2) + "\n").encode())
    fs.rename(staged, request.output / MANIFEST)
    return result | total | {"output": str(request.output), "seconds": round(seconds, 3)}


def simplex(text: str, count: int) -> list[tuple[float, ...]]:
    """All weights of ``count`` sources that are multiples of a step and have the sum 1.

    Args:
        text: ``simplex:step=S``, where 1 / S is a whole number.

    Raises:
        UsageError: something else, or more outputs than a sweep may have.
    """
    kind, _, rest = text.partition(":step=")
    try:
        step = float(rest)
    except ValueError:
        step = 0.0
    parts = round(1 / step) if 0 < step <= 1 else 0
    if kind != "simplex" or not parts or abs(parts * step - 1) > 1e-6:
        raise UsageError(
            f"--sweep {text!r} is no grid", hint="write simplex:step=S with 1 / S a whole number"
        )
    number = math.comb(parts + count - 1, count - 1)
    if number > MOST:
        raise UsageError(
            f"--sweep {text!r} has {number} points for {count} sources, at most {MOST}"
        )
    return [tuple(part / parts for part in row) for row in _compositions(parts, count)]


def _compositions(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to share a number out, in order of the first share."""
    for bars in itertools.combinations(range(total + count - 1), count - 1):
        edges = (-1, *bars, total + count - 1)
        yield tuple(right - left - 1 for left, right in itertools.pairwise(edges))


def _check_room(request: Request, needed: int) -> None:
    place = request.output.absolute() if request.output else None
    while place is not None and not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free if place is not None else needed
    if free < needed:
        raise RefusedError(
            f"{place}: all outputs need {needed:,} bytes, {free:,} are free",
            hint="a larger step, or another --output",
        )
