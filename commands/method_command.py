"""A command whose options depend on ``--method``.

It looks for ``--method NAME`` before it parses anything, and then parses with that method's options added, so
that ``--help`` shows them and a misspelt one is named together with its method.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from moesurg.surgery import methods
from moesurg.surgery.checkpoint.formats import ADAPTER
from moesurg.surgery.errors import MoesurgError, UsageError

from . import method_options

if TYPE_CHECKING:
    from moesurg.surgery.methods.base import Method
    from moesurg.surgery.sources import Takes

_PARAMETERS = "moesurg.parameters"
METHOD, VALUES = "moesurg.method", "moesurg.options"
"""Keys of the context's ``meta``: the chosen method, and its options by field name."""


class MethodCommand(TyperCommand):
    """A command whose options depend on ``--method``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Find the method, then parse with its options added."""
        command = self._command
        known = methods.names(command)
        name = self._chosen(args, known)
        helping = any(flag in args for flag in ctx.help_option_names)
        if name is not None and name not in known:
            if not ctx.resilient_parsing:
                raise UsageError(
                    f"{command} has no method {name!r}{like(name, known)}",
                    hint=f"its methods are {listed(known)}",
                )
        elif name is not None:
            method = methods.load(command, name, _kind(args))
            ctx.meta[METHOD] = method
            ctx.meta[_PARAMETERS] = method_options.parameters(method, taken=self.params)
        elif args and not helping and not ctx.resilient_parsing:
            raise self._none_chosen(known)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            if name is None or not hasattr(error, "possibilities"):
                raise
            raise self._unknown_option(ctx, error) from None

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters of the method, then the shared ones."""
        return [*ctx.meta.get(_PARAMETERS, ()), *super().get_params(ctx)]

    def invoke(self, ctx: Any) -> Any:
        """Call the command's function, with the method's options set apart."""
        names = [parameter.name for parameter in ctx.meta.get(_PARAMETERS, ())]
        ctx.meta[VALUES] = {name: ctx.params.pop(name) for name in names}
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The command's help with the table of its methods, or with what the chosen method does."""
        shown = copy.copy(self)
        method = ctx.meta.get(METHOD)
        if method is not None:
            shown.help = escape(_reflowed(method.description or method.info.summary))
            shown.epilog = escape(_sources_and_needs(method))
        TyperCommand.format_help(shown, ctx, formatter)
        if method is None:
            _print_methods(self._command, self.spelt("NAME"))

    def _chosen(self, args: Sequence[str], known: Sequence[str]) -> str | None:
        """The method that unparsed arguments name."""
        return _value_of("--method", args)

    def _none_chosen(self, known: Sequence[str]) -> UsageError:
        return UsageError(
            f"{self._command} needs --method", hint=f"its methods are {listed(known)}"
        )

    def spelt(self, method: str) -> str:
        """How the command line names a method."""
        return f"{self._command} --method {method}"

    @property
    def _command(self) -> str:
        if self.name is None:
            raise MoesurgError("a method command needs a name")
        return self.name

    def _unknown_option(self, ctx: Any, error: typer.TyperException) -> UsageError:
        method: Method = ctx.meta[METHOD]
        wrong = str(getattr(error, "option_name", ""))
        own = method_options.flags(method)
        shared = [option for parameter in super().get_params(ctx) for option in parameter.opts]
        return UsageError(
            f"{self.spelt(method.name)} has no option {wrong}{like(wrong, [*own, *shared])}",
            hint=f"options of {method.name} are {listed(own)}",
        )


class FlagCommand(MethodCommand):
    """A command of which each method is chosen by an option called like it: ``convert --layout fused``."""

    def _chosen(self, args: Sequence[str], known: Sequence[str]) -> str | None:
        before = args[: args.index("--")] if "--" in args else args
        given = {word.partition("=")[0] for word in before}
        found = [name for name in known if f"--{name}" in given]
        if len(found) > 1:
            flags = " and ".join(f"--{name}" for name in found)
            raise UsageError(
                f"{self._command}: {flags} exclude each other", hint="give one of them"
            )
        return found[0] if found else None

    def _none_chosen(self, known: Sequence[str]) -> UsageError:
        return UsageError(
            f"{self._command} needs one of {', '.join(f'--{name}' for name in known)}",
            hint=f"moesurg {self._command} --help lists them",
        )

    def spelt(self, method: str) -> str:
        return f"{self._command} --{method}"


def _kind(args: Sequence[str]) -> Takes:
    """What the sources are, as far as folders on this machine tell; checked when they are opened."""
    adapters = any(
        not word.startswith("-") and os.path.isfile(os.path.join(word, ADAPTER.config))
        for word in args
    )
    return "adapters" if adapters else "models"


def _value_of(option: str, args: Sequence[str]) -> str | None:
    """The last value of an option in unparsed arguments, as a parser would find it."""
    found = None
    for position, argument in enumerate(args):
        if argument == "--":
            break
        if argument == option and position + 1 < len(args):
            found = args[position + 1]
        elif argument.startswith(option + "="):
            found = argument.removeprefix(option + "=")
    return found


def like(wrong: str, known: Sequence[str]) -> str:
    """The end of a sentence about a misspelt name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names) if names else "none yet"


def _print_methods(command: str, spelt: str) -> None:
    """The methods of a command below its help, in the same frame as the options."""
    known = [methods.load(command, name) for name in methods.names(command)]
    found = Table.grid(padding=(0, 2))
    found.add_column(style="bold cyan", no_wrap=True)
    found.add_column()
    for method in known:
        found.add_row(method.name, Text(method.info.summary))
    title = f"Methods (moesurg {spelt} --help shows the options of one)"
    frame = Panel(found if known else Text("none yet"), title=title, title_align="left")
    frame.border_style = "dim"
    Console(no_color=bool(os.environ.get("NO_COLOR"))).print(frame)


def _reflowed(text: str) -> str:
    """Paragraphs on one line each, for a terminal to wrap; indented ones, such as equations, as they are."""
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(
        paragraph if paragraph.startswith(" ") else " ".join(paragraph.split())
        for paragraph in paragraphs
    )


def _sources_and_needs(method: Method) -> str:
    info = method.info
    paper = f" Paper: {info.paper}." if info.paper else ""
    needs = {
        "none": "no text",
        "routed": "routing statistics of some text",
        "all-expert": "outputs of every expert on some text",
        "means": "a text for every model",
        "prompts": "prompts for every model",
        "neurons": "a text for every expert",
        "gram": "Gram matrices of every linear layer's inputs on some text",
        "shifted": "the same, of the original and the compressed model together, from text",
    }[info.data]
    verb = "can use" if info.optional else "needs"
    asked = [option.metadata["help"] for option in dataclasses.fields(method.options)]
    if info.data == "none" and any({"text", "sampled"} & set(words.split()) for words in asked):
        needs += " by default"
    kinds = [found.info.takes for found in methods.named(method.command, method.name)]
    others = "".join(
        f" Another method of this name takes {kind}: name one of them before --help to see its options."
        for kind in kinds
        if kind != info.takes
    )
    loads = "an adapter of its base" if info.takes == "adapters" else info.tier
    return f"Takes {info.inputs}; {verb} {needs}; output loads as {loads}.{paper}{others}"
