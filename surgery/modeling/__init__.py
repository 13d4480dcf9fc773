"""Model code that custom outputs carry: copied byte for byte, and what ``verify`` holds their copy against."""

from __future__ import annotations

from pathlib import Path

FILE = "modeling_moesurg.py"
"""Its name here and in an output."""

PREFIX = "moesurg_"
"""Before a stock ``model_type``: that of the same model with low-rank layers."""


def template() -> bytes:
    """The installed file."""
    return (Path(__file__).parent / FILE).read_bytes()


def auto_map(class_name: str) -> dict[str, str]:
    """The ``auto_map`` of a config whose model subclasses a stock ``...ForCausalLM``."""
    family = class_name.removesuffix("ForCausalLM")
    module = FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.Moesurg{family}Config",
        "AutoModel": f"{module}.Moesurg{family}Model",
        "AutoModelForCausalLM": f"{module}.Moesurg{class_name}",
    }
