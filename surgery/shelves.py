"""The folders of a shelf, from its own list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .checkpoint.formats import SHELF
from .checkpoint.header import read_json
from .checkpoint.reader import contained
from .errors import InputError


def listing(path: Path) -> dict[str, Any]:
    """What ``shelf.json`` says; ``members`` holds what it says of each folder.

    Raises:
        InputError: it lists no members.
    """
    found: dict[str, Any] = dict(read_json(contained(path, SHELF)))
    listed = found.get("members")
    if not isinstance(listed, dict) or not all(isinstance(said, dict) for said in listed.values()):
        raise InputError(f"{path / SHELF}: members should be an object of objects")
    return found


def members(path: Path) -> list[str]:
    """Names of the folders that hold an adapter or a model each, sorted.

    Raises:
        InputError: one of them is no folder in the shelf.
    """
    return sorted(folder(path, name, SHELF) for name in listing(path)["members"])


def router(path: Path) -> list[str]:
    """The folder of the router, if it has one of its own.

    Raises:
        InputError: it is no folder in the shelf.
    """
    named = read_json(contained(path, SHELF)).get("router_folder")
    if named is None:
        return []
    if not isinstance(named, str):
        raise InputError(f"{path / SHELF}: router_folder should be a name")
    return [folder(path, named, SHELF)]


def folder(path: Path, name: str, file: str) -> str:
    """The name of a folder that a file lists, checked.

    Raises:
        InputError: it leads outside, is a link or is not there.
    """
    if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
        raise InputError(f"{path / file}: {name!r} is no name of a folder in it")
    if (path / name).is_symlink() or not (path / name).is_dir():
        raise InputError(f"{path}: folder {name!r} is missing")
    return name
