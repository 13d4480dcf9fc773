"""What a run can start from, seen alike by everything that knows bytes and no method.

These are stock models, adapters, and outputs of ours that bring model code (custom models).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from .adapters.adapter import Adapter
from .architectures.model import Model
from .checkpoint.formats import ADAPTER, PACK, format_of, refuse_shelf
from .checkpoint.reader import Checkpoint
from .custom import CustomModel, is_custom_folder
from .errors import InputError
from .packs import Pack

Takes = Literal["models", "adapters", "model and adapters", "custom models", "packs"]
"""What a method's sources are; ``model and adapters``: a model first, then adapters of it."""


class Source(Protocol):
    """An opened and validated folder. Holds no weight."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Its config, tensors and files."""

    @property
    def folder(self) -> Path:
        """Where it lies."""

    @property
    def label(self) -> str:
        """What reports call its kind: a ``model_type``, or ``adapter``."""


def open_source(folder: Path) -> Source:
    """Open a folder as what it is.

    Raises:
        InputError: naming the first thing that is wrong with it.
    """
    found = format_of(folder)
    if found == ADAPTER:
        return Adapter.open(folder)
    if found == PACK:
        return Pack.open(folder)
    return CustomModel.open(folder) if is_custom_folder(folder) else Model.open(folder)


def kind_of(folders: Sequence[Path]) -> Takes:
    """What sources are together, told from the names of their files.

    Raises:
        InputError: models and adapters in another order than a model first, or only some of them stock.
    """
    formats = [format_of(folder) for folder in folders]
    for folder, found in zip(folders, formats, strict=True):
        if found.member is not None:
            refuse_shelf(folder)
    if all(found == PACK for found in formats):
        return "packs"
    if PACK in formats:
        raise InputError(
            f"{folders[formats.index(PACK)]}: is a pack, from which nothing else can be made directly",
            hint="moesurg revert takes out what is in it",
        )
    ours = [is_custom_folder(folder) for folder in folders]
    if all(ours):
        return "custom models"
    if any(ours):
        raise InputError(
            f"{folders[ours.index(True)]}: brings model code, other sources do not",
            hint="make a stock model of it first: moesurg convert --expand",
        )
    adapters = [found == ADAPTER for found in formats]
    if not any(adapters):
        return "models"
    if all(adapters):
        return "adapters"
    if not adapters[0] and all(adapters[1:]):
        return "model and adapters"
    first = folders[adapters.index(False)]
    raise InputError(
        f"{first}: is a model among adapters",
        hint="merges take adapters alone or models alone; adapter apply takes the model first, then its adapters",
    )
