"""Cuts of whole models: where the largest changes of a fine-tune end, all its tensors taken together.

What is found before a weight is merged: one value for each fine-tune, and for every tensor how many of its elements
that are equal to the value are among the largest, the first in the order of layers and positions. No more than a block
of each source is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...checkpoint.dtypes import FLOATING
from ._blocks import RUN, SLACK, runs_of, sum_type
from ._merge import names_of

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...checkpoint.region import Region
    from ...linalg.selection import Cut
    from ...weights import Weights

MOST_RUNS = 256
"""Of a model, for the sample; at least one of each tensor."""


def decide(weights: Weights, density: float) -> dict[str, Any]:
    """The cuts that leave floor(density n) of the n changes of each fine-tune.

    Returns:
        By layer, by tensor: [value, equal ones] for each fine-tune; the value is None where nothing is taken.
    """
    models: Sequence[Model] = weights.sources
    first, tuned = models[0], range(1, len(models))
    wholes = [first.whole(name) for name in _ordered(first) if _floating(models, name)]
    count = sum(whole.count for whole in wholes)
    found = [_cut(weights, wholes, source, count, int(density * count)) for source in tuned]
    layer_of = {name: layer.index for layer in first.layers for name in layer.names}
    left = [cut.equal for cut in found]
    decided: dict[str, Any] = {}
    for whole in weights.track(wholes):
        rows = []
        for index, cut in enumerate(found):
            equal = 0
            if left[index]:
                equal = sum(
                    int((change.abs().double() == cut.value).sum())
                    for change in _changes(weights, whole, index + 1)
                )
            taken = min(equal, left[index])
            left[index] -= taken
            rows.append([cut.value if cut.value < float("inf") else None, taken])
        decided.setdefault(str(layer_of.get(whole.tensor)), {})[whole.tensor] = rows
    return decided


def cuts(decision: dict[str, Any], tensor: str) -> list[Cut]:
    """Those of one tensor."""
    from ...linalg.selection import NOTHING, Cut

    return [NOTHING if value is None else Cut(value, equal) for value, equal in decision[tensor]]


def _cut(weights: Weights, wholes: Sequence[Region], source: int, count: int, k: int) -> Cut:
    import torch

    from ...linalg.selection import Bracket, by_buckets, trivial

    known = trivial(count, k)
    if known is not None:
        return known
    # A tensor gives as many runs as it has a share of the model.
    sample = torch.cat(
        [
            _change(weights, run, source).reshape(-1).double()
            for whole in wholes
            for run in runs_of(whole.tensor, whole.count, _runs(whole.count, count))
        ]
    )
    bracket = Bracket(count, k, sample, SLACK)
    for whole in weights.track(wholes):
        for change in _changes(weights, whole, source):
            bracket.add(change.double())

    def again() -> Iterator[torch.Tensor]:
        for whole in wholes:
            yield from _changes(weights, whole, source)

    return bracket.cut() or by_buckets(again, count, k)


def _runs(elements: int, count: int) -> int:
    return max(1, min(elements // RUN, round(MOST_RUNS * elements / count)))


def _ordered(model: Model) -> list[str]:
    """Names of tensors by layer; those outside layers come first, in their own order."""
    layer_of = {name: layer.index for layer in model.layers for name in layer.names}
    return sorted(names_of(model), key=lambda name: layer_of.get(name, -1))


def _floating(models: Sequence[Model], name: str) -> bool:
    return {model.dtype(name) for model in models} <= FLOATING


def _changes(weights: Weights, whole: Region, source: int) -> Iterator[torch.Tensor]:
    """The change of a tensor, in blocks."""
    dtype = sum_type(weights.sources, whole.tensor)
    pairs = zip(weights.blocks(replace(whole, source=source)), weights.blocks(whole), strict=True)
    for tuned, base in pairs:
        yield tuned.to(dtype).sub_(base.to(dtype))


def _change(weights: Weights, region: Region, source: int) -> torch.Tensor:
    """The change of a region, float64."""
    dtype = sum_type(weights.sources, region.tensor)
    tuned, base = (weights.read(replace(region, source=s)).to(dtype) for s in (source, 0))
    return tuned.sub_(base)
