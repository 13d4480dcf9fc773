"""One run of one method: headers, plan, calibration, decisions, units, report, commit."""

from __future__ import annotations

import dataclasses
import os
import resource
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint.formats import PACK
from .checkpoint.hub import resolve
from .errors import InputError, UsageError, as_written
from .executors.base import choose_workers
from .job import Job, check_disk, plan_of
from .methods import load, spelt, taking
from .methods.base import Draft, Method
from .packs import Pack
from .plan import Plan, validate
from .progress import Progress, stoppable
from .report import card, record
from .sources import Source, Takes, kind_of, open_source
from .sweep import run_sweep


@dataclass(frozen=True)
class Request:
    """What the user asked for, parsed.

    Attributes:
        options: values of the method's options by field name.
        tokens, seq_len: calibration text in all and per sequence.
        calibration: an existing statistics folder, or None to calibrate on ``data``.
        max_memory: bytes, or None for what the machine has.
    """

    command: str
    method: str
    sources: tuple[str, ...]
    output: Path | None
    options: dict[str, object] = field(default_factory=dict)
    seed: int = 0
    data: tuple[Path, ...] = ()
    tokens: int = 65536
    seq_len: int = 512
    calibration: Path | None = None
    force: bool = False
    resume: bool = False
    dry_run: bool = False
    workers: int | None = None
    max_memory: int | None = None
    device: str = "cpu"
    max_shard_bytes: int = 5_000_000_000


def run(request: Request, progress: Progress) -> dict[str, Any]:
    """Do it, and return the result record for the user.

    Raises:
        MoesurgError: any of its kinds; nothing is left behind, or a resumable staging folder.
    """
    if request.options.get("sweep"):
        return run_sweep(request, progress)
    started = time.monotonic()
    folders = [resolve(source) for source in request.sources]
    method = _method_for(request, kind_of(folders))
    sources = [open_source(folder) for folder in folders]
    options = method.parse(request.options)
    with _trusted(sources):
        draft = method.plan(sources, options)
    if (draft.data or method.info.data) == "none" and (request.data or request.calibration):
        raise UsageError(
            f"{' '.join(spelt(request.command, request.method))} uses no statistics",
            hint="leave out --data and --calibration",
        )
    plan = plan_of(request, sources, draft, options)
    read = [*sources, *draft.references.values()]
    validate(plan, [source.checkpoint for source in read])
    card.common_licence([source.folder for source in read])
    workers = choose_workers(plan, request.workers, request.max_memory)
    if request.dry_run:
        return _summary(request, sources, plan, draft, started, workers) | {
            "dry_run": True,
            "plan": {
                "tensors": [[spec.name, spec.dtype, list(spec.shape)] for spec in plan.tensors],
                "units": [unit.id for unit in plan.units],
                "config": draft.config,
                "memory": plan.memory,
            },
        }
    if request.output is None:
        raise UsageError("an output folder is needed", hint="-o DIR, or --dry-run to plan only")
    check_disk(request.output, plan)
    with stoppable(progress) as stop:
        job = Job(request, method, sources, draft, plan, options, workers, progress, stop)
        complete = job.perform()
    result = _summary(request, sources, job.plan, job.draft, started, workers)
    return result | {"dry_run": False, "already_complete": complete}


def _trusted(sources: Sequence[Source]) -> AbstractContextManager[None]:
    """Packs are planned from what their own file says, which somebody may have changed."""
    packs = [source for source in sources if isinstance(source, Pack)]
    return as_written(packs[0].folder / PACK.config) if packs else nullcontext()


def _method_for(request: Request, kind: Takes) -> Method:
    """The method, which has to take sources like these."""
    method = load(request.command, request.method, kind)
    takes = method.info.takes
    if takes != kind:
        known = taking(request.command, kind)
        fitting = ", ".join(known) if known else "no method of this command"
        if kind == "custom models":
            fitting = "make a stock model first: moesurg convert --expand; nothing else"
        raise InputError(
            f"{' '.join(spelt(request.command, request.method))} takes {takes}, the sources are {kind} "
            f"({', '.join(request.sources)})",
            hint=f"{fitting} can take {kind}",
        )
    return method


def _summary(
    request: Request,
    sources: Sequence[Source],
    plan: Plan,
    draft: Draft,
    started: float,
    workers: int,
) -> dict[str, Any]:
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * scale
    return {
        "schema_version": record.SCHEMA_VERSION,
        "command": request.command,
        "method": request.method,
        "output": None if request.output is None else str(request.output),
        "tier": draft.tier,
        "exactness": dataclasses.asdict(draft.exactness),
        "tensors": len(plan.tensors),
        "units": len(plan.units),
        "workers": workers,
        "bytes": plan.bytes,
        "parameters": record.parameters(sources, plan),
        "notes": list(draft.notes),
        "seconds": round(time.monotonic() - started, 3),
        "planned_memory_bytes": plan.memory,
        "peak_memory_bytes": max(peak, children),
    }
