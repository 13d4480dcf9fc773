"""Model code that custom outputs carry: copied byte for byte, and what ``verify`` holds their copy against.

``modeling_moesurg.py`` makes the classes; each kind of part that stock classes lack is a file ``moesurg_<part>.py``
beside it, with the part's ``KEY`` in the config and ``apply(body, config)``, which puts it into a stock base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..architectures.base import Family

FILE = "modeling_moesurg.py"
"""The file that makes the classes."""

PREFIX = "moesurg_"
"""Before a stock ``model_type``: that of the same model with parts of ours."""


def files() -> dict[str, bytes]:
    """The installed files by name; an output carries all of them, because the first one imports the others."""
    folder = Path(__file__).parent
    return {
        name: (folder / name).read_bytes()
        for name in (FILE, *sorted(path.name for path in folder.glob(f"{PREFIX}*.py")))
    }


def auto_map(class_name: str) -> dict[str, str]:
    """The ``auto_map`` of a config whose model subclasses a stock ``...ForCausalLM``."""
    family = class_name.removesuffix("ForCausalLM")
    # The family's own names belong to its model of text and images.
    family = {"Llama4": "Llama4Text"}.get(family, family)
    module = FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.Moesurg{family}Config",
        "AutoModel": f"{module}.Moesurg{family}Model",
        "AutoModelForCausalLM": f"{module}.Moesurg{class_name}",
    }


def custom_config(family: Family, config: Mapping[str, object]) -> dict[str, object]:
    """A stock config as that of the same model with parts of ours; the parts' keys are the caller's to add."""
    return {
        **config,
        "model_type": PREFIX + family.model_type,
        "architectures": ["Moesurg" + family.class_name],
        "auto_map": auto_map(family.class_name),
    }
