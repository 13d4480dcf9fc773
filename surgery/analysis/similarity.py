"""How alike the experts of a layer are: in their router rows, weights and outputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..checkpoint.region import Region

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..architectures.model import Experts
    from ..weights import Weights

    Matrix = NDArray[np.float64]

CHUNK = 1 << 24
"""Elements of all experts together that are held at a time."""

SUMMED = 4096
"""Products of float32 values that are added up before they go into a float64 sum."""


def cosines(gram_EE: Matrix) -> Matrix:
    """Cosines from inner products; 0 to an expert of zeros."""
    import numpy as np

    norm_E = np.sqrt(np.diagonal(gram_EE))
    product_EE = np.outer(norm_E, norm_E)
    found: Matrix = np.divide(gram_EE, product_EE, out=np.zeros_like(gram_EE), where=product_EE > 0)
    return found


def router_cosines(weights: Weights, experts: Experts) -> Matrix:
    """Cosines of the router's rows [E, E]."""
    rows_ED = weights.read(experts.router).double()
    found: Matrix = (rows_ED @ rows_ED.T).numpy()
    return cosines(found)


def weight_cosines(weights: Weights, experts: Experts) -> Matrix:
    """Cosines [E, E] of all projections of an expert as one vector, neurons in their stored order.

    Experts are read in parts of equal place and size, all experts side by side, so that each is read once.
    """
    import torch

    gram_EE = torch.zeros(experts.count, experts.count, dtype=torch.float64)
    size = max(1, CHUNK // experts.count)
    for blocks in zip(*(_flat(experts, expert) for expert in range(experts.count)), strict=True):
        count = blocks[0].count
        for start in range(0, count, size):
            stop = min(start + size, count)
            part_EN = torch.stack(
                [weights.read(block.rows(start, stop)).float() for block in blocks]
            )
            for first in range(0, stop - start, SUMMED):
                piece_EN = part_EN[:, first : first + SUMMED]
                gram_EE += (piece_EN @ piece_EN.T).double()
    found: Matrix = gram_EE.numpy()
    return cosines(found)


def pairs(matrix_EE: Matrix, *, largest: bool = True, count: int = 3) -> list[dict[str, Any]]:
    """The pairs of different experts with the most extreme values, NaN left out; ties by index."""
    found = [
        (float(matrix_EE[i, j]), i, j)
        for i in range(len(matrix_EE))
        for j in range(i + 1, len(matrix_EE))
        if matrix_EE[i, j] == matrix_EE[i, j]
    ]
    found.sort(key=lambda item: (-item[0] if largest else item[0], item[1], item[2]))
    return [{"experts": [i, j], "value": value} for value, i, j in found[:count]]


def summary(matrix_EE: Matrix) -> dict[str, Any]:
    """Mean over different experts, and the most similar pairs."""
    experts = len(matrix_EE)
    others = experts * (experts - 1)
    mean = float((matrix_EE.sum() - matrix_EE.trace()) / others) if others else 1.0
    return {"mean": mean, "most_similar": pairs(matrix_EE)}


def _flat(experts: Experts, expert: int) -> Iterator[Region]:
    """An expert's matrices as flat stored ranges, whatever the order of elements inside them."""
    matrix = experts.hidden * experts.width
    layout = experts.layout
    if layout.kind == "per-expert":
        for part in ("gate", "up", "down"):
            region = experts.region(expert, part)
            yield Region(region.tensor, (matrix,), region.offset)
        return
    for name, count in (("gate_up", 2 * matrix), ("down", matrix)):
        yield Region(experts.prefix + layout.names[name], (count,), expert * count)
