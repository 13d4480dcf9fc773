"""Where to cut spectra: one threshold for all matrices of a model, after each spectrum was put on a scale of its own.

Every function takes singular values of one matrix, largest first, float64 [P]. A value counts as cut below a
threshold k if its place z on the scale is below k, so that k = 0 cuts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

Values = NDArray[np.float64]
SCALES = ("minmax", "energy", "quantile")


def places(values_P: Values, scale: str) -> Values:
    """The place of every value on its matrix's own scale, from 1 (kept longest) down to 0.

    * ``minmax``: (s - min) / (max - min), the rule of WeLore (arXiv:2407.11239). One outlier moves all others.
    * ``quantile``: the same between the 5 % and the 95 % quantile, clipped.
    * ``energy``: the share of sum s^2 that cutting this value and all smaller ones would lose.

    A flat spectrum has no value that should go first: all places are 1 by the first two rules.

    Raises:
        UsageError: an unknown scale.
    """
    if scale == "energy":
        tail_P = np.square(values_P)[::-1].cumsum()[::-1]
        return tail_P / tail_P[0] if tail_P[0] > 0 else np.zeros_like(values_P)
    if scale == "minmax":
        low, high = values_P[-1], values_P[0]
    elif scale == "quantile":
        low, high = np.quantile(values_P, [0.05, 0.95])
    else:
        raise UsageError(f"scale {scale!r} is none of {', '.join(SCALES)}")
    if not high - low > 1e-12 * abs(values_P[0]):
        return np.ones_like(values_P)
    found: Values = np.clip((values_P - low) / (high - low), 0.0, 1.0)
    return found


def cut(places_P: Values, threshold: float) -> int:
    """How many values lie below a threshold."""
    return int((places_P < threshold).sum())


def pooled_threshold(places: Sequence[Values], fraction: float) -> float:
    """The threshold that cuts a fraction of all values together; of ties all are kept."""
    if not 0 <= fraction < 1:
        raise UsageError(f"a fraction of {fraction} of all values cannot be cut")
    pooled = np.sort(np.concatenate(list(places)))
    index = int(np.ceil(fraction * len(pooled) - 1e-9))
    return float(pooled[min(index, len(pooled) - 1)]) if index else 0.0
