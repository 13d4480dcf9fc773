"""Facts about model families, one file each. The listing of this folder is the registry."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from ..errors import InputError
from .base import Family


@cache
def families() -> dict[str, Family]:
    """Every family by ``model_type``."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f".{module.name}", __name__), "FAMILY", None)
        if isinstance(family, Family):
            found[family.model_type] = family
    return found


def family_of(config: Mapping[str, object], where: str) -> Family:
    """The family of a config.

    Raises:
        InputError: no ``model_type``, an unsupported one, or quantised weights.
    """
    model_type = config.get("model_type")
    known = families()
    if not isinstance(model_type, str) or model_type not in known:
        raise InputError(
            f"{where}: model_type {model_type!r} is not supported",
            hint=f"supported are {', '.join(sorted(known))}",
        )
    if config.get("quantization_config"):
        raise InputError(
            f"{where}: holds quantised weights, which surgery would have to guess at",
            hint="start from the unquantised checkpoint",
        )
    return known[model_type]
