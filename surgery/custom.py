"""Outputs that bring model code: read as a source, and loaded with the installed copy of that code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architectures import family_of
from .checkpoint.header import read_json
from .checkpoint.reader import Checkpoint, contained, open_checkpoint
from .errors import InputError
from .modeling import PREFIX, auto_map, files

if TYPE_CHECKING:
    from .architectures.base import Family

CONFIG = "config.json"


class CustomModel:
    """A folder whose classes are ours. Holds no weight.

    Attributes:
        family: that of the stock class which ours subclasses.
        parts: what of the config belongs to parts that are not stock, by key.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        where = checkpoint.folder / CONFIG
        config = checkpoint.config
        if not is_custom(config):
            raise InputError(f"{where}: names no model with code of moesurg")
        model_type = str(config["model_type"]).removeprefix(PREFIX)
        self.family: Family = family_of({**config, "model_type": model_type}, str(where))
        if config.get("auto_map") != auto_map(self.family.class_name):
            raise InputError(f"{where}: architectures, model_type and auto_map do not agree")
        self.parts = {key: value for key, value in config.items() if key.startswith(PREFIX)}

    @classmethod
    def open(cls, folder: Path) -> CustomModel:
        """Open a folder; its tensors are checked when they are used.

        Raises:
            InputError: naming what is wrong with it.
        """
        return cls(open_checkpoint(folder))

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def label(self) -> str:
        return PREFIX + self.family.model_type

    @property
    def stock_config(self) -> dict[str, object]:
        """The config of the stock class, without a trace of ours."""
        config = {
            key: value
            for key, value in self.checkpoint.config.items()
            if key != "auto_map" and not key.startswith(PREFIX)
        }
        return {
            **config,
            "model_type": self.family.model_type,
            "architectures": [self.family.class_name],
        }


def is_custom(config: object) -> bool:
    """Whether a config is that of an output with model code of ours."""
    return isinstance(config, dict) and str(config.get("model_type", "")).startswith(PREFIX)


def is_custom_folder(folder: Path) -> bool:
    """The same of a folder; False where it has no readable config, which opening it will say."""
    try:
        return is_custom(read_json(contained(folder, CONFIG)))
    except InputError:
        return False


def foreign_file(folder: Path) -> Path | None:
    """The first file of model code that is missing or is not the installed one."""
    for name, code in files().items():
        if not (folder / name).is_file() or contained(folder, name).read_bytes() != code:
            return folder / name
    return None


def load_custom(checkpoint: Checkpoint) -> Any:
    """The model in float32, run by the installed code, never by the folder's.

    Raises:
        InputError: it does not load, or not completely.
    """
    import torch
    from transformers.utils import logging as stock_logging

    from .modeling import modeling_moesurg

    folder = checkpoint.folder
    own = auto_map(CustomModel(checkpoint).family.class_name)
    logging: Any = stock_logging
    logging.disable_progress_bar()
    try:
        config_class: Any = getattr(modeling_moesurg, own["AutoConfig"].rpartition(".")[2])
        model_class: Any = getattr(modeling_moesurg, own["AutoModelForCausalLM"].rpartition(".")[2])
        model, found = model_class.from_pretrained(
            folder,
            config=config_class.from_pretrained(folder, local_files_only=True),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except (
        Exception
    ) as error:  # whatever transformers raises for a config or weights that do not fit
        raise InputError(f"{folder}: does not load with its model code ({error})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise InputError(
                f"{folder}: loading reports {kind.replace('_', ' ')}: {sorted(found[kind])[:3]}"
            )
    return model.eval()
