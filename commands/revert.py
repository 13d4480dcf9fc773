"""``moesurg revert``: adapters and models back out of a pack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurg.surgery.errors import UsageError

from . import options as shared
from .operate import show
from .output import Reporter, emit

if TYPE_CHECKING:
    from rich.console import Console

PackFolder = Annotated[
    str,
    typer.Argument(metavar="PACK", help="Folder that merge wrote as a pack.", show_default=False),
]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="The input to take out.", show_default=False),
]
All = Annotated[
    bool, typer.Option("--all", help="Take out every input, each into a folder of its name.")
]


def revert(
    pack: PackFolder,
    task: Task = None,
    everything: All = False,
    output: shared.Output = None,
    force: shared.Force = False,
    dry_run: shared.DryRun = False,
    resume: shared.Resume = False,
    workers: shared.Workers = None,
    max_memory: shared.MaxMemory = None,
    max_shard_size: shared.MaxShardSize = "5GB",
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Take adapters or models back out of a pack that `merge --method rmm` or `tsv-c` wrote.

    With `--task` the output folder is that adapter or model. With `--all` it holds a folder for every input, named
    like it; each of them appears complete or not at all.
    """
    if everything == (task is not None):
        raise UsageError("revert needs either --task NAME or --all")
    if output is None and not dry_run:
        raise UsageError("revert needs --output", hint="or --dry-run, which writes nothing")
    memory = None if max_memory is None else shared.parse_size(max_memory, "--max-memory")
    shard_bytes = shared.parse_size(max_shard_size, "--max-shard-size")

    from moesurg.surgery import operation
    from moesurg.surgery.checkpoint.hub import resolve
    from moesurg.surgery.packs import Pack

    opened = Pack.open(resolve(pack))
    names = opened.names if task is None else [opened.names[opened.index(task)]]
    records: list[dict[str, Any]] = []
    with Reporter(quiet=quiet) as progress:
        for name in names:
            request = operation.Request(
                command="revert",
                method=opened.kind,
                sources=(pack,),
                output=_folder(output, name) if everything else output,
                options={"task": name},
                force=force,
                resume=resume,
                dry_run=dry_run,
                workers=workers,
                max_memory=memory,
                max_shard_bytes=shard_bytes,
            )
            records.append(operation.run(request, progress))
    record = records[0] if not everything else {"command": "revert", "outputs": records}
    emit(record, as_json=as_json, human=lambda console: _show(console, records))


def _folder(output: Path | None, name: str) -> Path | None:
    """The folder of one input; names from a file must not lead out of the output."""
    if output is None:
        return None
    if Path(name).name != name or name in (".", ".."):
        raise UsageError(
            f"the task name {name!r} cannot name a folder", hint="take it out with --task and -o"
        )
    return output / name


def _show(console: Console, records: list[dict[str, Any]]) -> None:
    for record in records:
        show(console, record)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("revert", no_args_is_help=True)(revert)
