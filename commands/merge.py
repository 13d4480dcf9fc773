"""``moesurg merge``: fewer experts from many, or one model from several."""

import typer

from .method_command import MethodCommand
from .operate import operate

HELP = """Merge the experts of one mixture into fewer, or several models into one.

Methods for several models take models of one shape; those that merge changes take the base first: `merge BASE A B`.

Add `--method NAME` to see what that method computes and its own options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge", cls=MethodCommand, help=HELP, no_args_is_help=True)(operate)
