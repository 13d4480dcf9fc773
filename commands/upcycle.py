"""``moesurg upcycle``: a mixture of experts from a dense model."""

import typer

from .method_command import MethodCommand
from .operate import operate

HELP = """Grow a dense model into a mixture of experts.

Add `--method NAME` to see what that method computes and its own options.
"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("upcycle", cls=MethodCommand, help=HELP, no_args_is_help=True)(operate)
