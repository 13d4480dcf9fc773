"""``moesurg expert``: operations on the experts of a mixture."""

import typer

from . import method_group

HELP = """Work on the experts of a mixture: drop, add, compress or replace them.

`moesurg expert NAME --help` says what an operation computes, and lists its options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    method_group.register(app, "expert", HELP)
