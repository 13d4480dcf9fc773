"""A command whose methods are subcommands: ``moesurg expert drop …``.

The subcommands are made from the registry when they are asked for, so that calling one loads no other.
"""

from __future__ import annotations

import inspect
from typing import Any

import typer
import typer.main
from rich.markup import escape
from typer.core import TyperGroup

from moesurg.surgery import methods
from moesurg.surgery.errors import MoesurgError, UsageError

from .method_command import METHOD, MethodCommand, like, listed
from .operate import operate


class NamedCommand(MethodCommand):
    """The subcommand of one method; ``group`` is the command that it belongs to."""

    group = ""

    def _chosen(self, args: Any, known: Any) -> str | None:
        return self.name

    def spelt(self, method: str) -> str:
        return f"{self.group} {method}"

    @property
    def _command(self) -> str:
        return self.group


class MethodGroup(TyperGroup):
    """The methods of a command as its subcommands."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, from the folder listing alone."""
        return list(methods.names(self._group))

    def get_command(self, ctx: Any, cmd_name: str) -> NamedCommand | None:
        """The subcommand of a method, or None if there is no such method."""
        if cmd_name not in methods.names(self._group):
            return None
        summary = methods.load(self._group, cmd_name).info.summary
        scratch = typer.Typer(add_completion=False)
        scratch.command(
            cmd_name,
            cls=NamedCommand,
            help=escape(f"{summary[:1].upper()}{summary[1:]}."),
            no_args_is_help=True,
        )(_operate)
        made = typer.main.get_command(scratch)
        if not isinstance(made, NamedCommand):
            raise MoesurgError(f"the command line made no command of {cmd_name}")
        made.group = self._group
        return made

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand that the arguments name.

        Raises:
            UsageError: there is none; lists those there are.
        """
        name, known = args[0], methods.names(self._group)
        if name not in known and not name.startswith("-") and not ctx.resilient_parsing:
            raise UsageError(
                f"{self._group} has no method {name!r}{like(name, known)}",
                hint=f"its methods are {listed(known)}",
            )
        return super().resolve_command(ctx, args)

    @property
    def _group(self) -> str:
        if self.name is None:
            raise MoesurgError("a group of methods needs a name")
        return self.name


def _operate(context: typer.Context, **shared: Any) -> None:
    """Run the method that is the called subcommand."""
    operate(context, method=context.meta[METHOD].name, **shared)


# The subcommand is the method: it takes every shared option but the one that would name it.
_signature = inspect.signature(operate, eval_str=True)
_operate.__signature__ = _signature.replace(  # type: ignore[attr-defined]
    parameters=[entry for name, entry in _signature.parameters.items() if name != "method"]
)
_operate.__annotations__ = {
    name: entry.annotation for name, entry in _signature.parameters.items() if name != "method"
}


def register(app: typer.Typer, name: str, text: str) -> None:
    """Add the group of a command's methods, unless it has none."""
    if not methods.names(name):
        return
    group = typer.Typer(cls=MethodGroup, no_args_is_help=True, subcommand_metavar="NAME [ARGS]...")

    @group.callback(help=text)
    def _group() -> None:
        """The group itself does nothing."""

    app.add_typer(group, name=name)
