"""What several families of methods in this folder ask of their options and sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InputError, UsageError

if TYPE_CHECKING:
    from ...architectures.model import Model


def one_model(models: Sequence[Model]) -> Model:
    """The one source.

    Raises:
        InputError: several sources.
    """
    if len(models) != 1:
        raise InputError(f"compressing takes one model, {len(models)} were given")
    return models[0]


def check_ratio(ratio: float) -> None:
    """Refuse a fraction that leaves everything or nothing.

    Raises:
        UsageError: out of range.
    """
    if not 0 < ratio < 1:
        raise UsageError(f"--ratio {ratio} should be above 0 and below 1")


def check_damping(damping: float) -> None:
    """Refuse a multiple of the mean diagonal that no Gram matrix can take.

    Raises:
        UsageError: negative or not finite.
    """
    if not 0 <= damping < float("inf"):
        raise UsageError(f"--damping {damping} should be at least 0")
