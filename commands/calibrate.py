"""``moesurg calibrate``: the statistics of a model on some text, for later merges."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesurg.surgery.errors import UsageError

from . import options as shared
from .output import Reporter, emit, facts, in_bytes

if TYPE_CHECKING:
    from rich.console import Console

RoutedOnly = Annotated[
    bool,
    typer.Option(
        "--routed-only",
        help="Compute only the experts a token selects, instead of every expert on every token.",
        rich_help_panel="Statistics",
    ),
]
Inputs = Annotated[
    int,
    typer.Option(
        "--inputs",
        min=0,
        metavar="N",
        help="Rows of each layer's input to keep as a sample.",
        rich_help_panel="Statistics",
    ),
]
Gram = Annotated[
    bool,
    typer.Option(
        "--gram",
        help="Keep the Gram matrix of each layer's inputs too.",
        rich_help_panel="Statistics",
    ),
]
Trace = Annotated[
    bool,
    typer.Option(
        "--trace",
        help="Keep which experts every token selected too.",
        rich_help_panel="Statistics",
    ),
]
LinearGrams = Annotated[
    bool,
    typer.Option(
        "--linear-grams",
        help="Keep the Gram matrix of the inputs of every linear layer instead of statistics of experts, "
        "for `compress`; of a dense model too.",
        rich_help_panel="Statistics",
    ),
]


def calibrate(
    source: shared.Source,
    output: shared.Output = None,
    data: shared.Data = None,
    tokens: shared.Tokens = 65536,
    seq_len: shared.SeqLen = 512,
    routed_only: RoutedOnly = False,
    inputs: Inputs = 0,
    gram: Gram = False,
    trace: Trace = False,
    linear_grams: LinearGrams = False,
    device: shared.Device = "cpu",
    force: shared.Force = False,
    resume: shared.Resume = False,
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Run text through a model, one layer at a time, and keep statistics of its experts or linear layers.

    The folder it writes serves every later merge (with `--linear-grams`, every later compression) of the same
    model, through `--calibration`.
    """
    if output is None:
        raise UsageError("calibrate needs --output", hint="name the folder for the statistics")
    if linear_grams and (routed_only or inputs or gram or trace):
        raise UsageError(
            "--linear-grams excludes the options of statistics of experts",
            hint="run calibrate twice to have both",
        )
    from moesurg.surgery.calibration import run

    with Reporter(quiet=quiet) as progress:
        record = run.calibrate(
            source,
            output,
            data=tuple(data or ()),
            tokens=tokens,
            seq_len=seq_len,
            mode="routed" if routed_only else "all-expert",
            inputs=inputs,
            gram=gram,
            trace=trace,
            linear_grams=linear_grams,
            device=device,
            force=force,
            resume=resume,
            progress=progress,
        )
    emit(record, as_json=as_json, human=lambda console: _show(console, record))


def _show(console: Console, record: dict[str, Any]) -> None:
    rows = {}
    for key, value in record.items():
        if key != "schema_version" and isinstance(value, str | int | float):
            text = in_bytes(value) if key.endswith("bytes") else str(value)
            rows[key.replace("_", " ")] = f"{value:.1f} s" if key == "seconds" else text
    console.print(facts(rows))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate", no_args_is_help=True)(calibrate)
