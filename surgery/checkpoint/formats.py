"""The kinds of folders there are: what their config and their weights are called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """

    name: str
    config: str
    stem: str
    sharded: bool
    member: Format | None = None

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

FORMATS = {found.name: found for found in (MODEL, ADAPTER, PACK, ADAPTERS, MODELS)}


def format_of(folder: Path) -> Format:
    """What a folder holds, told from the files that are there.

    A folder with an adapter and the config of its base is an adapter: PEFT's own readers see it so.

    Raises:
        InputError: it holds an adapter's weights and a model's.
    """
    if (folder / PACK.config).exists():
        return PACK
    if (folder / SHELF).exists():
        return MODELS if any(folder.glob(f"*/{MODEL.config}")) else ADAPTERS
    adapter = (folder / ADAPTER.config).exists()
    weights = any((folder / name).exists() for name in (MODEL.single, MODEL.index))
    if adapter and weights:
        raise InputError(
            f"{folder}: holds the weights of a model and an adapter, so what is meant cannot be told",
            hint="put them in two folders",
        )
    return ADAPTER if adapter else MODEL
