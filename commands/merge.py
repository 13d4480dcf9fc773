"""``moesurg merge``: fewer experts from many."""

import typer

from .method_command import MethodCommand
from .operate import operate

HELP = """Merge the experts of a mixture into fewer.

Add `--method NAME` to see what that method computes and its own options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge", cls=MethodCommand, help=HELP, no_args_is_help=True)(operate)
