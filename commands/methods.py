"""``moesurg methods``: every method there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moesurg.surgery import methods as registry

from . import method_options
from . import options as shared
from .output import emit, table

if TYPE_CHECKING:
    from rich.console import Console

    from moesurg.surgery.methods.base import MethodInfo

Markdown = Annotated[
    bool, typer.Option("--markdown", help="Print the table in Markdown, as the README has it.")
]


def methods(as_json: shared.Json = False, markdown: Markdown = False) -> None:
    """List every method: what it takes, which statistics it needs, how its output loads."""
    record = {
        "methods": [
            {
                "command": method.command,
                "name": method.name,
                "usage": " ".join(
                    ["moesurg", *registry.spelt(method.command, method.name, ["SOURCE"])]
                ),
                "summary": method.info.summary,
                "paper": method.info.paper,
                "inputs": method.info.inputs,
                "data": method.info.data,
                "optional": method.info.optional,
                "tier": method.info.tier,
                "options": method_options.describe(method),
            }
            for method in registry.methods()
        ]
    }
    if markdown and not as_json:
        typer.echo(markdown_table())
        return
    emit(record, as_json=as_json, human=_show)


def _show(console: Console) -> None:
    found = table("command", "method", "what it does", "takes", "statistics", "loads as", "paper")
    for method in registry.methods():
        info = method.info
        found.add_row(
            method.command,
            method.name,
            info.summary,
            info.inputs,
            _statistics(info),
            info.tier,
            info.paper or "-",
        )
    console.print(found)


def _statistics(info: MethodInfo) -> str:
    return f"{info.data}, if given" if info.optional else info.data


def markdown_table() -> str:
    """The registry as a Markdown table."""
    rows = [
        "| Command | Method | What it does | Takes | Statistics | Loads as | Paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in registry.methods():
        info = method.info
        cells = (
            f"`{method.command}`",
            f"`{method.name}`",
            info.summary,
            info.inputs,
            _statistics(info),
            info.tier,
            info.paper or "-",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("methods")(methods)
