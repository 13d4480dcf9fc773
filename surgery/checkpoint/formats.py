"""The kinds of folders there are: what their config and their weights are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ..errors import InputError


@dataclass(frozen=True)
class Format:
    """How a folder of weights is laid out.

    Attributes:
        name: what plans and reports call it.
        config: the JSON file that says what the weights are.
        stem: weights are ``<stem>.safetensors`` or, where ``sharded``, several files and an index.
        sharded: whether loaders of this format read several files.
        member: of a shelf, the format of each of its folders; None for everything else.
        others: of a shelf, folders by name that have another format.
    """

    name: str
    config: str
    stem: str
    sharded: bool
    member: Format | None = None
    others: Mapping[str, Format] = field(default_factory=dict)

    def of(self, folder: str) -> Format:
        """The format of one of a shelf's folders."""
        return self.others.get(folder, self.member or self)

    @property
    def single(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index.json"


MODEL = Format("model", "config.json", "model", sharded=True)
"""A transformers checkpoint."""
ADAPTER = Format("adapter", "adapter_config.json", "adapter_model", sharded=False)
"""A PEFT adapter."""
PACK = Format("pack", "pack.json", "pack", sharded=True)
"""Several adapters or models in one folder, from which each can be taken out again."""

SHELF = "shelf.json"
"""What says which folders a shelf has."""
ADAPTERS = Format("adapters", SHELF, ADAPTER.stem, sharded=False, member=ADAPTER)
"""A shelf of adapters: a folder each, all made by one run. Its tensors are planned as ``<folder>/<name>``."""
MODELS = Format("models", SHELF, MODEL.stem, sharded=True, member=MODEL)
"""A shelf of models."""
BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"
BASED = Format(
    "model and adapter",
    SHELF,
    MODEL.stem,
    sharded=True,
    member=MODEL,
    others={ADAPTER_FOLDER: ADAPTER},
)
"""A shelf of one model and one adapter of it, in folders of these names."""

FORMATS = {found.name: found for found in (MODEL, ADAPTER, PACK, ADAPTERS, MODELS, BASED)}


def format_of(folder: Path) -> Format:
    """What a folder holds, told from the files that are there.

    A folder with an adapter and the config of its base is an adapter: PEFT's own readers see it so.

    Raises:
        InputError: it holds an adapter's weights and a model's.
    """
    if (folder / PACK.config).exists():
        return PACK
    if (folder / SHELF).exists():
        if (folder / BASE_FOLDER / MODEL.config).exists() and (
            folder / ADAPTER_FOLDER / ADAPTER.config
        ).exists():
            return BASED
        return MODELS if any(folder.glob(f"*/{MODEL.config}")) else ADAPTERS
    adapter = (folder / ADAPTER.config).exists()
    weights = any((folder / name).exists() for name in (MODEL.single, MODEL.index))
    if adapter and weights:
        raise InputError(
            f"{folder}: holds the weights of a model and an adapter, so what is meant cannot be told",
            hint="put them in two folders",
        )
    return ADAPTER if adapter else MODEL


def refuse_other(folder: Path) -> None:
    """Say what a folder is that was opened as a model and is something else.

    Raises:
        InputError: it is an adapter, a pack or a shelf, and has no config of a model.
    """
    if (folder / MODEL.config).exists():
        return
    found = format_of(folder)
    if found == ADAPTER:
        raise InputError(
            f"{folder}: is an adapter, and a model is needed here",
            hint="moesurg adapter apply BASE ADAPTER makes a model of both",
        )
    if found == PACK:
        raise InputError(
            f"{folder}: is a pack, and a model is needed here",
            hint="moesurg revert takes out what is in it",
        )
    if found.member is not None:
        refuse_shelf(folder)


def refuse_shelf(folder: Path) -> NoReturn:
    """Name the folders of a shelf, which are inputs, where the shelf is given as one.

    Raises:
        InputError: always.
    """
    inside = sorted({path.parent for path in folder.glob("*/*config.json")})
    raise InputError(
        f"{folder}: holds several folders, each of which is an input of its own",
        hint="give one of them: " + ", ".join(map(str, inside[:4])),
    )
