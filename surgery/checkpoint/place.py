"""What lies at the place of an output: questions about it, refusals, and how it is taken away."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError, RefusedError
from . import fs
from .journal import JOURNAL

REPORT = "report.json"
"""Its key ``fingerprint`` holds `fingerprint_digest` of the run: a finished run is known by it."""


def refuse_existing(output: Path, *, force: bool) -> None:
    """Refuse an output that is there already, unless it is to be replaced, or that no rename can put there.

    Raises:
        RefusedError: naming what lies there.
    """
    if os.path.ismount(output):
        raise RefusedError(
            f"the output {output} is a mount point and cannot be put in place by a rename",
            hint=f"choose a folder inside it, such as {output / 'model'}",
        )
    if occupied(output) and not force:
        what = "a folder that is not empty" if output.is_dir() else "a file"
        raise RefusedError(
            f"the output {output} already exists as {what}",
            hint="choose another --output; --force replaces it after success",
        )


def refuse_overlap(targets: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Refuse to write where something is read: no target may be, hold or lie inside an input.

    Args:
        targets: paths that a run creates, replaces or removes, symbolic links resolved.

    Raises:
        RefusedError: naming both.
    """
    for given in inputs:
        source = Path(os.path.realpath(given))
        for target in targets:
            if _same(target, source):
                how = "is"
            elif any(_same(parent, source) for parent in target.parents):
                how = "lies inside"
            elif any(_same(parent, target) for parent in source.parents):
                how = "contains"
            else:
                continue
            raise RefusedError(
                f"the output {target} {how} the input {given}",
                hint="choose an --output outside every input",
            )


def discard(path: Path) -> None:
    """Remove a file or folder, if it is there.

    A removal that is killed leaves nothing that looks like a complete output or a run to resume.
    """
    if path.is_dir() and not path.is_symlink():
        for name in (REPORT, JOURNAL):
            if os.path.isfile(path / name):
                fs.unlink(path / name)
        fs.fsync_dir(path)
        fs.rmtree(path)
    elif os.path.lexists(path):
        fs.unlink(path)


def report_digest(folder: Path) -> str | None:
    """The fingerprint's digest that a folder's report states; None where there is no such report."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (OSError, ValueError):
        return None
    found = report.get("fingerprint") if isinstance(report, dict) else None
    return found if isinstance(found, str) else None


def occupied(path: Path) -> bool:
    """Whether something other than an empty folder is at ``path``."""
    return any(path.iterdir()) if path.is_dir() else os.path.lexists(path)


def plain_name(name: str, *, private: frozenset[str]) -> str:
    """A plain file name, or one in a folder of the output, which the members of a shelf have."""
    folder, _, leaf = name.rpartition("/")
    parts = [folder, leaf] if folder else [name]
    if any(
        part in ("", ".", "..") or any(character in part for character in "/\\:\0")
        for part in parts
    ):
        raise InputError(f"{name!r} is not a plain file name and cannot be a file of the output")
    if name in private:
        raise InputError(f"a file of the output cannot be named {name!r}: moesurg uses that name")
    return name


def _same(a: Path, b: Path) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return a == b
