"""What the commands that write models have in common: one function from shared options to the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurg.surgery.errors import UsageError

from . import options as shared
from .method_command import METHOD, VALUES
from .output import Reporter, emit, facts, in_bytes, in_number

if TYPE_CHECKING:
    from rich.console import Console

MethodName = Annotated[
    str,
    typer.Option("--method", metavar="NAME", help="The method; it adds its own options."),
]


def operate(
    context: typer.Context,
    sources: shared.Sources,
    method: MethodName,
    output: shared.Output = None,
    force: shared.Force = False,
    dry_run: shared.DryRun = False,
    resume: shared.Resume = False,
    seed: shared.Seed = 0,
    workers: shared.Workers = None,
    max_memory: shared.MaxMemory = None,
    max_shard_size: shared.MaxShardSize = "5GB",
    device: shared.Device = "cpu",
    data: shared.Data = None,
    tokens: shared.Tokens = 65536,
    seq_len: shared.SeqLen = 512,
    calibration: shared.Calibration = None,
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Run a method of the command that was called."""
    command = context.meta[METHOD].command
    if output is None and not dry_run:
        raise UsageError(f"{command} needs --output", hint="or --dry-run, which writes nothing")
    if calibration is not None and data:
        raise UsageError(
            "--calibration and --data exclude each other",
            hint="the statistics already fix the text they were taken on",
        )
    memory = None if max_memory is None else shared.parse_size(max_memory, "--max-memory")
    shard_bytes = shared.parse_size(max_shard_size, "--max-shard-size")

    from moesurg.surgery import operation

    request = operation.Request(
        command=command,
        method=method,
        sources=tuple(sources),
        output=output,
        options=dict(context.meta[VALUES]),
        seed=seed,
        data=tuple(data or ()),
        tokens=tokens,
        seq_len=seq_len,
        calibration=calibration,
        force=force,
        resume=resume,
        dry_run=dry_run,
        workers=workers,
        max_memory=memory,
        device=device,
        max_shard_bytes=shard_bytes,
    )
    with Reporter(quiet=quiet) as progress:
        record = operation.run(request, progress)
    emit(record, as_json=as_json, human=lambda console: show(console, record))


def show(console: Console, record: dict[str, Any]) -> None:
    """A result or a plan, for people."""
    exactness = record.get("exactness") or {}
    parameters = record.get("parameters") or {}
    rows = {
        "plan" if record.get("dry_run") else "output": str(record.get("output") or "(not given)"),
        "method": str(record.get("method")),
        "loads as": str(record.get("tier")),
        "function": f"{exactness.get('kind')}: {exactness.get('reason')}",
        "parameters": f"{in_number(parameters.get('before'))} -> "
        f"{in_number(parameters.get('after'))}",
        "tensors": f"{record.get('tensors')} in {in_bytes(record.get('bytes'))}",
    }
    units = record.get("units")
    if record.get("dry_run") and units is not None:
        rows["units of work"] = str(units if isinstance(units, int) else len(units))
    if record.get("seconds") is not None:
        rows["time"] = f"{record['seconds']:.1f} s"
    memory = "planned_memory_bytes" if record.get("dry_run") else "peak_memory_bytes"
    if record.get(memory) is not None:
        rows["memory of a unit" if record.get("dry_run") else "peak memory"] = in_bytes(
            record[memory]
        )
    console.print(facts(rows))
    for sentence in record.get("notes") or ():
        console.print(f"- {sentence}")
    if record.get("already_complete"):
        console.print("The output was complete already; nothing was done.")
    if record.get("dry_run"):
        console.print("Nothing was written.")
