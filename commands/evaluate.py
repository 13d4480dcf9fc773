"""``moesurg eval``: perplexity, and the distance from another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from . import options as shared
from .output import Reporter, emit, table

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = {
    "tokens": ("tokens", "{:,}"),
    "perplexity": ("perplexity", "{:.4f}"),
    "kl": ("KL (nats)", "{:.6f}"),
    "top1_agreement": ("same top token", "{:.2%}"),
    "max_logit_difference": ("max |logit difference|", "{:.3e}"),
}
"""Key of the record, heading, and how a value is printed."""


def evaluate(
    source: shared.Source,
    reference: shared.Reference = None,
    data: shared.Data = None,
    tokens: shared.Tokens = 16384,
    seq_len: shared.SeqLen = 512,
    device: shared.Device = "cpu",
    as_json: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Measure perplexity on text and, with `--reference`, how far the predictions are from that model's."""
    from moesurg.surgery.evaluate import evaluate_sources

    with Reporter(quiet=quiet) as progress:
        record = evaluate_sources(
            source,
            reference=reference,
            data=tuple(data or ()),
            tokens=tokens,
            seq_len=seq_len,
            device=device,
            progress=progress,
        )
    emit(record, as_json=as_json, human=lambda console: _show(console, record))


def _show(console: Console, record: dict[str, Any]) -> None:
    rows = {**record["domains"], "overall": record["overall"]}
    present = [key for key in COLUMNS if any(key in row for row in rows.values())]
    headings = [COLUMNS[key][0] for key in present]
    found = table("domain", *headings, right=headings)
    for name, row in rows.items():
        found.add_row(
            name,
            *("" if row.get(key) is None else COLUMNS[key][1].format(row[key]) for key in present),
        )
    console.print(found)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval", no_args_is_help=True)(evaluate)
