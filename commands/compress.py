"""``moesurg compress``: the same layers from fewer numbers."""

import typer

from .method_command import MethodCommand
from .operate import operate

HELP = """Store the linear layers of a model with fewer numbers.

Add `--method NAME` to see what that method computes and its own options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compress", cls=MethodCommand, help=HELP, no_args_is_help=True)(operate)
