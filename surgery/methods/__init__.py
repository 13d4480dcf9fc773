"""Every operation, one file a method, a folder a kind. The listing is the registry; nothing here imports torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..sources import Takes
    from .base import Method

FOLDERS = {
    "adapter": ("adapter",),
    "compress": ("compress",),
    "convert": ("convert",),
    "expert": ("expert",),
    "merge": ("experts", "models", "adapters"),
    "prune": ("prune",),
    "revert": ("revert",),
    "upcycle": ("upcycle",),
}
"""Which folders hold the methods of a command."""

BY_FLAG = frozenset({"convert"})
"""Commands without ``--method``: a method is chosen by its first option, which is called like the method."""

BY_NAME = frozenset({"adapter", "expert"})
"""Commands of which every method is a subcommand."""


BY_SOURCE = frozenset({"revert"})
"""Commands whose method the source decides."""


def spelt(command: str, method: str, sources: Sequence[str] = ()) -> list[str]:
    """How a command line begins that calls a method, without the program's name and the method's options."""
    if command in BY_NAME:
        return [command, method, *sources]
    return (
        [command, *sources]
        if command in BY_FLAG | BY_SOURCE
        else [command, *sources, "--method", method]
    )


@cache
def names(command: str) -> tuple[str, ...]:
    """The methods of a command, from the folder listing alone."""
    return tuple(dict.fromkeys(name for name, _ in _listing(command)))


def load(command: str, name: str, kind: Takes | None = None) -> Method:
    """A method by command and name.

    Args:
        command: such as ``merge``.
        name: of the method.
        kind: what the sources are. Where a name stands for one method for models and one for adapters, it chooses;
            it refuses nothing.

    Raises:
        UsageError: no such method; lists those there are.
    """
    found = named(command, name)
    if not found:
        raise UsageError(
            f"{command} has no method {name!r}", hint=f"its methods are {', '.join(names(command))}"
        )
    fitting = [method for method in found if method.info.takes == (kind or "models")]
    return (fitting or found)[0]


def named(command: str, name: str) -> list[Method]:
    """Every method of a command and name: one for each kind of sources that has one."""
    return [
        _method(command, name, importlib.import_module(module, __name__))
        for listed, module in _listing(command)
        if listed == name
    ]


def taking(command: str, kind: Takes) -> list[str]:
    """The methods of a command for sources of a kind."""
    return [name for name in names(command) if load(command, name, kind).info.takes == kind]


def methods() -> list[Method]:
    """Every method of every command, sorted."""
    return [
        _method(command, name, importlib.import_module(module, __name__))
        for command in sorted(FOLDERS)
        for name, module in _listing(command)
    ]


def _listing(command: str) -> list[tuple[str, str]]:
    found = []
    for folder in FOLDERS[command]:
        package = importlib.import_module(f".{folder}", __name__)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                found.append((module.name.replace("_", "-"), f".{folder}.{module.name}"))
    return sorted(found)


def _method(command: str, name: str, module: ModuleType) -> Method:
    # Only here: listing names must stay cheap, because every start of the program does it.
    from .base import Method

    return Method(
        command=command,
        name=name,
        info=module.INFO,
        options=module.Options,
        plan=module.plan,
        transform=module.transform,
        decide=getattr(module, "decide", None),
        description=(module.__doc__ or "").strip(),
        decide_from_weights=getattr(module, "decide_from_weights", None),
        settle=getattr(module, "settle", None),
        replacement=getattr(module, "replacement", None),
        draft_from_weights=getattr(module, "draft_from_weights", None),
    )
