"""Verification of a written adapter: its names, shapes and ranks are read back, and compared with its source's base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adapters.adapter import Adapter
from .errors import VerificationError


def verify_adapter(adapter: Adapter, report: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check what makes PEFT load an adapter without a missing or unexpected key.

    Returns:
        How it loads, and the promised exactness with the largest relative error that the run measured on a
        module's change of weight, as it is stored.

    Raises:
        VerificationError: a scale is not 1, or a module is not one that the config names.
    """
    targets = adapter.config.raw.get("target_modules")
    named = set(targets) if isinstance(targets, list) else set()
    for name, module in adapter.modules.items():
        if module.scale != 1:
            raise VerificationError(
                f"{adapter.folder}: module {name} has the scale {module.scale:g}, expected 1"
            )
        if module.kind != "experts" and name not in named:
            raise VerificationError(f"{adapter.folder}: target_modules does not name {name}")
    errors = [
        unit.get("stored_error", unit.get("error"))
        for unit in report["units"].values()
        if isinstance(unit, Mapping) and ("stored_error" in unit or "error" in unit)
    ]
    measured = max(errors, default=None)
    return (
        f"PEFT's LoRA format, {len(adapter.modules)} modules",
        dict(report["exactness"])
        | {
            "measured": measured,
            "measure": "largest relative distance of a module's change from the one it stands for",
            "reference": None,
        },
    )
