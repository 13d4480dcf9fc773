"""One expert from several: the weighted mean of a group, with whatever is done to it on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ._function import activation, hidden
from ._groups import Grouping
from ._least_squares import fit_down
from ._whitened import Given

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts
    from ...execute import Work
    from ...linalg.permutation import Alignment


def average(
    work: Work, experts: Experts, grouping: Grouping, slot: int
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The weighted mean of a group, in float64, members read one at a time.

    Returns the merged projections and, per projection, the spread: the root of the weighted mean squared
    distance of the members from their mean, relative to their root mean square.
    """
    import torch

    from ...linalg.svd import leading_left

    members, weights = grouping.groups[slot], grouping.weights[slot]
    aligned = work.params.get("align", "none") != "none" and len(members) > 1
    rank = work.params.get("rank")
    anchor = (
        0 if work.params.get("reference", "first") == "first" else grouping.representatives[slot]
    )
    match = _matcher(work, experts, anchor) if aligned else None
    given = Given.of(work, experts) if rank and work.params.get("whiten") else None
    sums: dict[str, torch.Tensor] = {}
    squares = dict.fromkeys(experts.layout.parts, 0.0)
    grams: dict[str, torch.Tensor] = {}
    matching: list[dict[str, float]] = []
    for member, weight in zip(members, weights, strict=True):
        matrices = _read(work, experts, member)
        if match is not None and member != anchor:
            found = match(matrices)
            matching.append({"expert": member, "before": found.before, "after": found.after})
            matrices = _reordered(matrices, found.order_F)
        for projection, matrix in matrices.items():
            wide = matrix.double()
            squares[projection] += weight * float(torch.linalg.vector_norm(wide)) ** 2
            if projection in sums:
                sums[projection].add_(wide, alpha=weight)
            else:
                sums[projection] = wide * weight
            if rank and projection in PROJECTIONS:
                gram = given.gram(member, matrices, projection) if given else wide @ wide.T
                grams[projection] = grams[projection] + gram if projection in grams else gram
    metrics: dict[str, object] = {"members": list(members), "weights": list(weights)}
    if matching:
        metrics["alignment"] = matching
    spread, truncation = {}, {}
    for projection, mean in sums.items():
        variance = squares[projection] - float(torch.linalg.vector_norm(mean)) ** 2
        spread[projection] = (max(0.0, variance) / max(squares[projection], 1e-300)) ** 0.5
        if rank and projection in PROJECTIONS:
            basis_OR = leading_left(grams[projection], rank)
            projected = basis_OR @ (basis_OR.T @ mean)
            lost = float((projected - mean).norm() / mean.norm().clamp_min(1e-300))
            truncation[projection] = lost
            sums[projection] = projected
    metrics["spread"] = spread
    if truncation:
        metrics["truncation"] = truncation
    if work.params.get("factors"):
        metrics["factors"] = _factor(sums, **work.params["factors"])
    if work.params.get("combine") == "least-squares" and len(members) > 1:
        metrics["least_squares"] = fit_down(work, experts, members, weights, sums)
    return sums, metrics


def _factor(
    sums: dict[str, torch.Tensor], *, rank: int, keep_rows: float, refits: int
) -> dict[str, float]:
    """Approximate each projection in place; returns the relative errors."""
    from ...linalg.row_sparse import split

    errors = {}
    for projection in (name for name in PROJECTIONS if name in sums):
        matrix = sums[projection]
        found = split(matrix, rank, int(keep_rows * len(matrix)), refits)
        sums[projection], errors[projection] = found.matrix_MN, found.error
    return errors


def _matcher(
    work: Work, experts: Experts, anchor: int
) -> Callable[[dict[str, torch.Tensor]], Alignment]:
    """What finds the permutation of an expert's neurons that brings it closest to expert ``anchor``."""
    from ...linalg.neuron_distance import align_normalised
    from ...linalg.permutation import align

    reference = _read(work, experts, anchor)
    if work.params.get("matching") != "ream":
        return lambda matrices: align(_triple(reference), _triple(matrices))
    kind = work.params["align"]
    if kind == "weight":
        return lambda matrices: align_normalised(
            _triple(reference), _triple(matrices), weights=True, activations=None
        )
    act, rows_ND = activation(work.model), work.inputs()
    anchored_NF = hidden(rows_ND, reference["gate"], reference["up"], act)
    return lambda matrices: align_normalised(
        _triple(reference),
        _triple(matrices),
        weights=kind == "both",
        activations=(anchored_NF, hidden(rows_ND, matrices["gate"], matrices["up"], act)),
    )


def _read(work: Work, experts: Experts, expert: int) -> dict[str, torch.Tensor]:
    return {projection: work.read(region) for projection, region in experts.regions(expert).items()}


def _reordered(matrices: dict[str, torch.Tensor], order_F: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same expert with its neurons in another order; the bias of down belongs to none of them."""
    found = {part: matrix[order_F] for part, matrix in matrices.items() if "down" not in part}
    found["down"] = matrices["down"][:, order_F]
    if "down_bias" in matrices:
        found["down_bias"] = matrices["down_bias"]
    return found


def _triple(
    matrices: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return matrices["gate"], matrices["up"], matrices["down"]
