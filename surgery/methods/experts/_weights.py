"""Inner products of experts' weights, read from the checkpoint in blocks of rows, for decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint.reader import TensorReader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...architectures.model import Experts

    Floats = NDArray[np.float64]

BLOCK_BYTES = 64 << 20
"""Most bytes of all experts' rows in float64 that are held at a time."""


def router_rows(reader: TensorReader, experts: Experts) -> Floats:
    """The router's rows [E, D]."""
    found: Floats = reader.read(experts.router).double().numpy()
    return found


def weight_gram(reader: TensorReader, experts: Experts, projections: Sequence[str]) -> Floats:
    """Inner products of the experts' flattened weights [E, E], as they lie: neurons are not aligned."""
    import numpy as np

    gram_EE = np.zeros((experts.count, experts.count))
    for projection in projections:
        rows, columns = experts.region(0, projection).shape
        block = max(1, BLOCK_BYTES // (8 * columns * experts.count))
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            stacked = np.stack(
                [
                    reader.read(experts.region(expert, projection).rows(start, stop))
                    .double()
                    .numpy()
                    .ravel()
                    for expert in range(experts.count)
                ]
            )
            gram_EE += stacked @ stacked.T
    return gram_EE


def cosine(gram_EE: Floats) -> Floats:
    """Cosines from inner products; 0 where a vector is zero."""
    import numpy as np

    norm_E = np.sqrt(np.diagonal(gram_EE))
    product_EE = np.outer(norm_E, norm_E)
    found: Floats = np.divide(gram_EE, product_EE, out=np.zeros_like(gram_EE), where=product_EE > 0)
    return np.clip(found, -1.0, 1.0)


def aligned_cosine(
    reader: TensorReader, experts: Experts, centres: Sequence[int], members: Sequence[int]
) -> dict[tuple[int, int], float]:
    """Cosine of [G; U] of every member and centre after the member's neurons are matched to the centre's."""
    import torch

    from ...linalg.permutation import align

    def read(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up, down = (
            reader.read(region).float() for region in experts.regions(expert).values()
        )
        return gate, up, down

    found = {}
    for centre in centres:
        reference = read(centre)
        for member in members:
            target = read(member)
            order_F = align(reference, target).order_F
            product = norm_r = norm_t = 0.0
            for left, right in zip(reference[:2], target[:2], strict=True):
                wide_r, wide_t = left.double(), right[order_F].double()
                product += float((wide_r * wide_t).sum())
                norm_r += float(wide_r.square().sum())
                norm_t += float(wide_t.square().sum())
            scale = (norm_r * norm_t) ** 0.5
            found[member, centre] = product / scale if scale > 0 else 0.0
    return found
