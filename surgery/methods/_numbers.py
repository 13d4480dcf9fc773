"""Lists of numbers that the user writes, one for every source."""

from __future__ import annotations

from ..errors import UsageError


def parse_numbers(
    option: str, text: str, count: int, of: str, *, hint: str | None = None
) -> list[float]:
    """Finite numbers separated by commas.

    Args:
        option: such as ``--weights``.
        count: how many there have to be.
        of: what each is of, in the plural.
        hint: for a list of another length.

    Raises:
        UsageError: not finite numbers, or not as many.
    """
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} should be numbers separated by commas") from None
    if len(found) != count:
        raise UsageError(f"{option} gives {len(found)} numbers for {count} {of}", hint=hint)
    if not all(abs(value) < float("inf") for value in found):
        raise UsageError(f"{option} {text!r} should be finite")
    return found
