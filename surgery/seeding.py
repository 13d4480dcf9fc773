"""Random streams that depend on the user's seed and on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def stream(seed: int, *path: str | int) -> np.random.Generator:
    """A generator for one purpose, such as ``stream(seed, "router", layer)``.

    Streams of different paths are independent, and a stream does not depend on which others were drawn, so
    work may run in any order and in any process. Philox keyed by SHA-256 of seed and path.
    """
    import numpy as np

    text = "\0".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    key = hashlib.sha256(text.encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
