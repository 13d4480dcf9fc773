"""The end of a run: everything in an output that is not weights, and the report on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .checkpoint.formats import FORMATS
from .checkpoint.place import REPORT
from .outputs import (
    carried_from_all,
    config_bytes,
    output_record,
    sources_record,
    write_archives,
)
from .report import card, record

if TYPE_CHECKING:
    from .checkpoint.commit import Staging
    from .job import Job


def finish(
    job: Job,
    staging: Staging,
    decision: dict[str, Any] | None,
    hashes: dict[str, str],
    metrics: dict[str, Any],
    digests: dict[Path, str],
) -> None:
    """Write everything that is not weights; the report last.

    Args:
        decision: what was journalled: ``layers`` and ``statistics``.
        hashes: SHA-256 of the shards, by file.
        metrics: of the units, by their ids.
        digests: SHA-256 of the inputs, by path.

    Raises:
        InputError: statistics of other weights than were read.
    """
    if job.statistics is not None:
        job.statistics.check(job.model, digests)
    small: dict[str, bytes] = {
        FORMATS[job.draft.format].config: config_bytes(
            job.draft.config, own_code=job.draft.tier == "custom"
        ),
        **job.draft.files,
        **{name: make(job.plan.units, metrics) for name, make in job.draft.results.items()},
    }
    small.update(job.plan.indexes())
    for name, data in carried_from_all([source.folder for source in job.sources]).items():
        small.setdefault(name, data)
    described = None if decision is None else decision["statistics"]
    report: dict[str, Any] = record.base_record(job.plan.command, job.plan.method)
    report |= {
        "command": record.command_line(
            job.plan.command,
            job.plan.method,
            job.request.sources,
            job.plan.options,
            job.plan.seed,
            [] if job.statistics is None else job.statistics.arguments(),
        ),
        "options": dict(job.plan.options),
        "seed": job.plan.seed,
        "fingerprint": job.fingerprint,
        "sources": sources_record(
            [*job.request.sources, *job.draft.references],
            job.sources,
            digests,
        ),
        "statistics": described,
        "format": job.draft.format,
        "tier": job.draft.tier,
        "exactness": dataclasses.asdict(job.draft.exactness),
        "notes": list(job.draft.notes),
        "parameters": record.parameters(job.given, job.plan),
        "decisions": None if decision is None else decision["layers"],
        "units": {name: metrics[name] for name in sorted(metrics) if metrics[name]},
        "unchanged": job.plan.unchanged,
    }
    small["README.md"] = card.card(
        report,
        job.request.sources,
        card.common_licence([source.folder for source in job.sources]),
        base=cast("str | None", job.draft.config.get("base_model_name_or_path")),
    )
    archives = write_archives(job.plan, staging, job.stop.check)
    report["output"] = output_record(job.plan, job.shards, hashes, small, archives)
    for name, data in small.items():
        staging.write_file(name, data)
    staging.write_file(REPORT, record.dump(report))
