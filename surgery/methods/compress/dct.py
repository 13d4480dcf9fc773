"""Coefficients on the vectors of a cosine transform that hold most of a matrix: a basis nobody has to store.

    W' = (W Q_I) Q_I^T   (or Q_I Q_I^T W),   I = the R vectors of the orthonormal DCT-II with the most energy in W.

The selection is that of FFT-based subspace selection (arXiv:2505.17967), which projects gradients so; ranked by squared
instead of absolute values, because for an orthonormal basis that loses least, and applied to weights, which is our
own. A matrix of M rows then takes R M numbers instead of R (M + N - R), at the price of a basis that does not know it.
The side, inputs or outputs, is the one that leaves more vectors at the asked size.

Channels of a language model have no order, so weights spread over all frequencies, and what is cut is hardly less
than its share: expect more error than ``svd`` at the same size. It is here for weights that do have such structure,
and to be compared with. No text is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
from ._parts import Entry, PartsOptions, Shape, largest_rank, plan_parts, write_parts

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="coefficients on selected vectors of a cosine transform",
    paper="arXiv:2505.17967",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(PartsOptions):
    """What the user chooses."""

    side: str = option(
        "auto",
        "what is transformed; auto: the side where a larger share of the vectors fits",
        choices=("auto", "input", "output"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """As many vectors in every matrix of a shape."""

    def entry_of(shape: Shape, dtype: str) -> Entry | None:
        best: tuple[float, Entry] | None = None
        for side in ("input", "output"):
            if options.side not in ("auto", side):
                continue

            def make(rank: int, side: str = side) -> Entry:
                return {"form": "cosine", "side": side, "rank": rank}

            size = shape[side == "input"]
            rank = largest_rank(make, size - 1, shape, dtype, options.ratio)
            if rank >= 1 and (best is None or rank / size > best[0]):
                best = (rank / size, make(rank))
        return None if best is None else best[1]

    return plan_parts(
        models,
        options,
        entry_of=entry_of,
        params={},
        memory=16,
    )


def transform(work: Work) -> dict[str, object]:
    """Select the vectors of one matrix."""
    from ...linalg.cosine import select

    (region,) = work.unit.reads
    entry = work.params["entry"]
    found = select(work.read(region), entry["rank"], entry["side"])
    tensors = {"coefficients.weight": found.coefficients, "frequencies": found.frequencies_R}
    return write_parts(work, found.dense(), tensors)
