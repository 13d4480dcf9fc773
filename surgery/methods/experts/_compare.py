"""What experts can be compared by, for decisions: points with distances, and cosines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...architectures.model import Experts
    from ...calibration.statistics import LayerStatistics
    from ...checkpoint.reader import TensorReader

    Floats = NDArray[np.float64]

BASES = ("outputs", "mean-outputs", "router-logits", "router-rows", "weights")


@dataclass(frozen=True)
class Compared:
    """The experts of a layer in one basis.

    Attributes:
        points_ED: one point an expert, with the distances of the basis; its coordinates mean nothing.
        cosine_EE: similarity of two experts.
    """

    points_ED: Floats
    cosine_EE: Floats


def compare(
    reader: TensorReader, experts: Experts, found: LayerStatistics | None, basis: str
) -> Compared:
    """Experts compared by their router logits or outputs on all tokens, rows of the router, or weights.

    Args:
        found: may be None for ``router-rows`` and ``weights``, which no text tells.

    Raises:
        InputError: statistics are needed and not given, or saw no token.
    """
    from ...linalg.clustering import points_from_gram
    from ._weights import cosine, router_rows, weight_gram

    if basis == "router-rows":
        rows_ED = router_rows(reader, experts)
        return Compared(rows_ED, cosine(rows_ED @ rows_ED.T))
    if basis == "weights":
        gram_EE = weight_gram(reader, experts, PROJECTIONS)
        return Compared(points_from_gram(gram_EE), cosine(gram_EE))
    if found is None or not found.tokens:
        raise InputError(f"comparing experts by {basis} needs statistics of some text")
    if basis == "router-logits":
        points_ED = points_from_gram(found.logit_gram_EE / found.tokens)
        return Compared(points_ED, cosine(found.logit_gram_EE))
    if basis == "outputs":
        points_ED = points_from_gram(found.output_gram_mean_EE)
        return Compared(points_ED, found.output_cosine_mean_EE)
    mean_ED = found.output_mean_ED
    return Compared(mean_ED, cosine(mean_ED @ mean_ED.T))
