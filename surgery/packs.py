"""A pack: several adapters or models in one folder, each of which can be taken out again.

``pack.json`` says what the tensors are:

* ``schema_version``; ``kind``: the method that wrote it, which is also the one that reads it
* ``tasks``: for each input its ``name``, the ``config`` it had, and what its kind needs beyond
* ``parts``: what its kind needs to know of every module or tensor, by name
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .checkpoint.formats import PACK
from .checkpoint.reader import Checkpoint, open_checkpoint
from .errors import InputError, UsageError

SCHEMA_VERSION = 1
KINDS = ("rmm", "tsv-c")


class Pack:
    """A validated pack. Holds no weight."""

    label = "pack"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        where, config = (
            checkpoint.folder / PACK.config,
            cast("Mapping[str, Any]", checkpoint.config),
        )
        if config.get("schema_version") != SCHEMA_VERSION or config.get("kind") not in KINDS:
            raise InputError(
                f"{where}: is schema {config.get('schema_version')!r} of kind {config.get('kind')!r}, this version "
                f"reads schema {SCHEMA_VERSION} of {', '.join(KINDS)}"
            )
        self.kind: str = config["kind"]
        tasks, parts = config.get("tasks"), config.get("parts")
        if not isinstance(tasks, list) or not isinstance(parts, dict) or not tasks:
            raise InputError(f"{where}: lists no tasks or no parts")
        self.tasks: list[Mapping[str, Any]] = tasks
        self.parts: Mapping[str, Any] = parts
        for task in tasks:
            if not isinstance(task, dict) or not isinstance(task.get("name"), str):
                raise InputError(f"{where}: has a task without a name")

    @classmethod
    def open(cls, folder: Path) -> Pack:
        """Open a folder.

        Raises:
            InputError: naming what is wrong with it.
        """
        if folder.is_dir() and not (folder / PACK.config).exists():
            raise InputError(
                f"{folder}: is no pack, it has no {PACK.config}",
                hint="merge --method rmm (adapters) and tsv-c (models) write packs",
            )
        return cls(open_checkpoint(folder, PACK))

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def names(self) -> list[str]:
        """What its inputs are called."""
        return [task["name"] for task in self.tasks]

    def index(self, name: str) -> int:
        """The position of a task.

        Raises:
            UsageError: there is none of this name; lists those there are.
        """
        if name not in self.names:
            raise UsageError(
                f"{self.folder}: holds no task {name!r}", hint=f"it holds {', '.join(self.names)}"
            )
        return self.names.index(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            InputError: the pack lacks it.
        """
        if name not in self.checkpoint.tensors:
            raise InputError(f"{self.folder}: tensor {name!r} is missing")
        return self.checkpoint.tensors[name].shape


def task_names(folders: Sequence[Path]) -> list[str]:
    """A name for every input: its folder's, or the repository's in the Hub's cache; numbered where two are equal."""
    found = []
    for folder in folders:
        cached = folder.parent.name == "snapshots"
        name = folder.parent.parent.name.rpartition("--")[2] if cached else folder.resolve().name
        found.append(name or "model")
    times = Counter(found)
    return [
        f"{name}-{position}" if times[name] > 1 else name
        for position, name in enumerate(found, start=1)
    ]
