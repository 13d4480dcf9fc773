"""Command-line options made from a method's ``Options`` dataclass.

A field ``top_k: int = option(2, "experts per token")`` becomes ``--top-k``. Typing, defaults and errors are
Typer's own: it is given a function that has the fields as its arguments.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import typer
import typer.main
from rich.markup import escape

from moesurg.surgery.errors import MoesurgError

if TYPE_CHECKING:
    from moesurg.surgery.methods.base import Method


def parameters(method: Method, *, taken: Sequence[Any] = ()) -> list[Any]:
    """Typer parameters for a method's options, made by Typer from a function that has them as arguments.

    Args:
        method: whose ``Options`` to read: name, type and default of each field, and its metadata ``help``,
            ``choices`` and ``metavar``.
        taken: parameters whose names and flags must not be used again.

    Raises:
        MoesurgError: the dataclass cannot be shown on a command line; a defect of the method file.
    """
    hints = get_type_hints(method.options)
    signature = []
    for field in dataclasses.fields(method.options):
        kind = _type(method, field, hints[field.name])
        annotation = cast(Any, Annotated)[kind, _option(method, field)]
        signature.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(field),
                annotation=annotation,
            )
        )

    def receiver(**values: object) -> None:
        """Stands for the method."""

    receiver.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    receiver.__annotations__ = {entry.name: entry.annotation for entry in signature}
    scratch = typer.Typer(add_completion=False)
    scratch.command()(receiver)
    made = list(typer.main.get_command(scratch).params)
    used = {flag for parameter in taken for flag in (*parameter.opts, parameter.name)}
    for parameter in made:
        for flag in (*parameter.opts, *parameter.secondary_opts, parameter.name):
            if flag in used:
                raise MoesurgError(
                    f"method {method.name}: option {flag} is one of the shared options"
                )
    return made


def _option(method: Method, field: dataclasses.Field[Any]) -> Any:
    sentence = field.metadata.get("help")
    if not sentence:
        raise MoesurgError(f"method {method.name}: option {field.name} has no help")
    flag = _flag(field.name)
    boolean = field.type in (bool, "bool")
    return typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if boolean else flag,
        help=escape(sentence),
        metavar=field.metadata.get("metavar") or None,
        show_default=_default(field) not in (None, inspect.Parameter.empty),
        rich_help_panel=f"Options of {method.name}",
    )


def _type(method: Method, field: dataclasses.Field[Any], hint: Any) -> Any:
    """The field's type, narrowed to its choices."""
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    bare = [part for part in get_args(hint) if part is not NoneType] if optional else [hint]
    if len(bare) != 1 or not (bare[0] in (int, float, str, bool) or get_origin(bare[0]) is Literal):
        raise MoesurgError(f"method {method.name}: option {field.name} has the type {hint}")
    choices = field.metadata.get("choices")
    found: Any = cast(Any, Literal)[tuple(choices)] if choices else bare[0]
    return found | None if optional else found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def flags(method: Method) -> list[str]:
    """The option names of a method."""
    return [_flag(field.name) for field in dataclasses.fields(method.options)]


def describe(method: Method) -> list[dict[str, object]]:
    """A method's options as JSON values, for ``moesurg methods``."""
    return [
        {
            "option": _flag(field.name),
            "help": field.metadata.get("help", ""),
            "choices": list(field.metadata.get("choices", ())),
            "required": _default(field) is inspect.Parameter.empty,
            "default": None if _default(field) is inspect.Parameter.empty else _default(field),
        }
        for field in dataclasses.fields(method.options)
    ]
