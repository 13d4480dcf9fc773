"""Merges that look at the singular vectors of matrices: what TSV-Merge and Iso-C share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import Draft, Exactness, option
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work

Merge = Callable[[list["torch.Tensor"]], tuple["torch.Tensor", dict[str, object]]]
"""From weighted changes [M, N] in float64 to the merged one and its metrics."""


@dataclass(frozen=True, kw_only=True)
class SpectralOptions(common.ChangeOptions):
    """What the user chooses."""

    embeddings: bool = option(
        False, "whether embedding and head are merged as matrices rather than averaged"
    )


def plan(models: Sequence[Model], options: SpectralOptions, params: Mapping[str, Any]) -> Draft:
    """Whole matrices are units; the rest goes by blocks."""
    notes = common.check(models, least=2, based=True)
    family = models[0].family
    tokens = set() if options.embeddings else {family.embedding, family.head}
    return common.plan_merge(
        models,
        {
            **params,
            "weights": common.parse_weights(options.weights, len(models) - 1),
            "scale": options.scale,
        },
        exactness=Exactness("approximate", "changes of fine-tunes are merged by their directions"),
        notes=notes,
        tensors=3 * len(models) + 6,
        matrices=lambda name: name not in tokens,
    )


def merge(work: Work, rule: Merge) -> dict[str, object]:
    """Write a unit: matrices by the rule, other tensors by the mean of the weighted changes."""
    weights, scale = work.params["weights"], work.params["scale"]
    blocks = reading.Blocks(work, based=True)
    if not work.params["matrix"]:
        reading.combine(work, blocks, [weight / len(weights) for weight in weights], scale)
        return {}
    metrics: dict[str, object] = {}
    for region in work.unit.writes:
        base, *tuned = blocks.read(region)
        if len(region.shape) != 2:
            # An expert's biases.
            changes = [(t - base) * (w / len(weights)) for t, w in zip(tuned, weights, strict=True)]
            work.write(region, base + sum(changes[1:], start=changes[0]) * scale)
            continue
        changes = [(t - base).double() * w for t, w in zip(tuned, weights, strict=True)]
        merged, measured = rule(changes)
        work.write(region, base + merged.to(base.dtype) * scale)
        metrics |= (
            measured
            if len(work.unit.writes) == 1
            else {f"{key}.{len(metrics)}": value for key, value in measured.items()}
        )
    return metrics
