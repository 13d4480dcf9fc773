"""``moesurg adapter``: operations on adapters."""

import typer

from . import method_group

HELP = """Work on adapters: combine, shrink, turn into experts, or apply them.

`moesurg adapter NAME --help` says what an operation computes, and lists its options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    method_group.register(app, "adapter", HELP)
