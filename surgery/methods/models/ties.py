"""Trim the changes of fine-tunes, elect a sign for every element, and average the changes that agree with it.

TIES-Merging (arXiv:2306.01708). The first source is the base, d_i = theta_i - theta_0:

    1. of each d_i only the largest magnitudes stay, a share ``density`` of each tensor
    2. s = sign(sum_i w_i d_i)
    3. d = sum over {i: sign(w_i d_i) = s} of w_i d_i, divided by the sum of their |w_i|
    4. theta = theta_0 + scale d

Deviations. The paper trims the whole model as one vector; here, as in mergekit, each tensor keeps exactly
floor(density n) elements, ties by position, so that no layer is silenced by another. The reference keeps one
element more. A sum of zero elects plus (the reference: the majority of the tensor), as in mergekit and PEFT.
``--no-normalize`` keeps the sum of step 3 (the paper's disjoint sum). Fine-tunes that are all the same give
themselves at ``--density 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="trim changes, elect signs, average what agrees",
    paper="arXiv:2306.01708",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.ChangeOptions):
    """What the user chooses."""

    density: float = option(0.2, "share of each tensor's changes that is kept, the largest")
    normalize: bool = option(True, "whether the agreeing changes are averaged rather than summed")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus elected changes."""
    notes = common.check(models, least=2, based=True)
    common.check_share("density", options.density)
    return common.plan_merge(
        models,
        {
            "weights": common.parse_weights(options.weights, len(models) - 1),
            "scale": options.scale,
            "density": options.density,
            "normalize": options.normalize,
        },
        exactness=Exactness("approximate", "changes of fine-tunes are trimmed and combined"),
        notes=notes,
        tensors=2 * len(models) + 4,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import elected
    from ...linalg.selection import Taking

    params, blocks = work.params, common.Blocks(work, based=True)
    kept = int(params["density"] * blocks.count)
    cuts = common.largest(blocks, len(params["weights"]), kept)
    taking = [Taking(cut) for cut in cuts]
    conflicts = 0
    for block in blocks:
        trimmed = [
            change * takes.mask(change.abs())
            for change, takes in zip(block.tensors, taking, strict=True)
        ]
        found = elected(trimmed, params["weights"], normalize=params["normalize"])
        conflicts += found.conflicts
        common.put(work, block, found.merged, params["scale"])
    return {"conflicts": conflicts / max(1, blocks.count)}
