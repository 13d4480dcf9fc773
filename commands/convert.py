"""``moesurg convert``: the same function, stored in another way."""

import typer

from . import options as shared
from .method_command import METHOD, FlagCommand
from .operate import operate

HELP = """Store a model in another way, without changing what it computes.

The option that says how is the choice of the method: `moesurg convert MODEL --layout fused -o DIR`.
"""


def convert(
    context: typer.Context,
    sources: shared.Sources,
    output: shared.Output = None,
    force: shared.Force = False,
    dry_run: shared.DryRun = False,
    resume: shared.Resume = False,
    workers: shared.Workers = None,
    max_memory: shared.MaxMemory = None,
    max_shard_size: shared.MaxShardSize = "5GB",
    seed: shared.Seed = 0,
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Run the method that the options chose."""
    operate(
        context,
        sources,
        context.meta[METHOD].name,
        output=output,
        force=force,
        dry_run=dry_run,
        resume=resume,
        seed=seed,
        workers=workers,
        max_memory=max_memory,
        max_shard_size=max_shard_size,
        as_json=as_json,
        quiet=quiet,
    )


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("convert", cls=FlagCommand, help=HELP, no_args_is_help=True)(convert)
