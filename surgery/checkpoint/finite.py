"""A scan for NaN and infinity at memory speed, without converting a value."""

from __future__ import annotations

# For each type: the width in bytes, the mask that drops the sign, and the smallest masked pattern whose
# exponent is all ones, which is infinity; everything above it is NaN.
_PATTERNS = {
    "F16": (2, 0x7FFF, 0x7C00),
    "BF16": (2, 0x7FFF, 0x7F80),
    "F32": (4, 0x7FFFFFFF, 0x7F800000),
    "F64": (8, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
_BLOCK = 1 << 17
"""Elements looked at together: small enough that the masked copy stays in cache."""


def first_non_finite(data: memoryview | bytes | bytearray, dtype: str) -> int | None:
    """Index of the first element that is NaN or infinite, or None.

    Args:
        data: whole little-endian elements.
        dtype: the header's type name; types without infinity are not scanned.
    """
    if dtype not in _PATTERNS:
        return None
    import numpy as np

    width, mask, infinity = _PATTERNS[dtype]
    unsigned = np.dtype(f"<u{width}")
    values = np.frombuffer(data, unsigned)
    masked = np.empty(min(_BLOCK, len(values)), unsigned)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        room = masked[: len(block)]
        np.bitwise_and(block, unsigned.type(mask), out=room)
        if int(room.max()) >= infinity:
            return start + int(np.argmax(room >= infinity))
    return None
