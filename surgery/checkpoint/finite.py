"""A scan for NaN and infinity at memory speed, without converting a value."""

from __future__ import annotations

# For each type: the width in bytes and the bits of infinity. Read as integers with a sign, numbers above it are NaN;
# read without one, so are those above its negative.
_INFINITY = {
    "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80),
    "F32": (4, 0x7F800000),
    "F64": (8, 0x7FF0000000000000),
}
_BLOCK = 1 << 17
"""Elements looked at together: few enough to stay in the cache for the second look."""


def first_non_finite(data: memoryview | bytes | bytearray, dtype: str) -> int | None:
    """Index of the first element that is NaN or infinite, or None.

    Args:
        data: whole little-endian elements.
        dtype: the header's type name; types without infinity are not scanned.
    """
    if dtype not in _INFINITY:
        return None
    import numpy as np

    width, infinity = _INFINITY[dtype]
    negative = infinity | 1 << 8 * width - 1
    positives = np.frombuffer(data, f"<i{width}")
    negatives = positives.view(f"<u{width}")
    for start in range(0, len(positives), _BLOCK):
        first, second = positives[start : start + _BLOCK], negatives[start : start + _BLOCK]
        if int(first.max()) >= infinity or int(second.max()) >= negative:
            return start + int(np.argmax((first >= infinity) | (second >= negative)))
    return None
