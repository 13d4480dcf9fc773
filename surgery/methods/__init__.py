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
    from .base import Method

FOLDERS = {
    "adapter": ("adapter",),
    "compress": ("compress",),
    "convert": ("convert",),
    "expert": ("expert",),
    "merge": ("experts",),
    "prune": ("prune",),
    "upcycle": ("upcycle",),
}
"""Which folders hold the methods of a command."""

BY_FLAG = frozenset({"convert"})
"""Commands without ``--method``: a method is chosen by its first option, which is called like the method."""

BY_NAME = frozenset({"adapter", "expert"})
"""Commands of which every method is a subcommand."""


def spelt(command: str, method: str, sources: Sequence[str] = ()) -> list[str]:
    """How a command line begins that calls a method, without the program's name and the method's options."""
    if command in BY_NAME:
        return [command, method, *sources]
    return [command, *sources] if command in BY_FLAG else [command, *sources, "--method", method]


@cache
def names(command: str) -> tuple[str, ...]:
    """The methods of a command, from the folder listing alone."""
    return tuple(name for name, _ in _listing(command))


def load(command: str, name: str) -> Method:
    """A method by command and name.

    Raises:
        UsageError: no such method; lists those there are.
    """
    for found, module in _listing(command):
        if found == name:
            return _method(command, name, importlib.import_module(module, __name__))
    raise UsageError(
        f"{command} has no method {name!r}", hint=f"its methods are {', '.join(names(command))}"
    )


def methods() -> list[Method]:
    """Every method of every command, sorted."""
    return [load(command, name) for command in sorted(FOLDERS) for name in names(command)]


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
    )
