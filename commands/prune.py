"""``moesurg prune``: some experts of many."""

import typer

from .method_command import MethodCommand
from .operate import operate

HELP = """Keep some experts of a mixture as they are, and drop the others.

Add `--method NAME` to see what that method computes and its own options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("prune", cls=MethodCommand, help=HELP, no_args_is_help=True)(operate)
