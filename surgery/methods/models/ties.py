"""Trim the changes of fine-tunes, elect a sign for every element, and average the changes that agree with it.

TIES-Merging (arXiv:2306.01708). The first source is the base, d_i = theta_i - theta_0:

    1. of each d_i only the largest magnitudes stay, a share ``density`` of each tensor
    2. s = sign(sum_i w_i d_i)
    3. d = sum over {i: sign(w_i d_i) = s} of w_i d_i, divided by the sum of their |w_i|
    4. theta = theta_0 + scale d

Deviations. The paper trims the whole model as one vector (``--trim model``); the default, as in mergekit, keeps
exactly floor(density n) elements of each tensor, ties by position, so that no layer is silenced by another. With
``--trim model`` every source is read twice more before the merge, and ties go by layer and position. The reference
keeps one element more. A sum of zero elects plus (the reference: the majority of the tensor), as in mergekit and PEFT.
``--no-normalize`` keeps the sum of step 3 (the paper's disjoint sum). Fine-tunes that are all the same give
themselves at ``--density 1``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import Draft, MethodInfo, option
from . import _blocks as reading
from . import _merge as common
from . import _whole as whole

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="trim changes, elect signs, average what agrees",
    paper="arXiv:2306.01708",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.ChangeOptions):
    """What the user chooses."""

    density: float = option(0.2, "share of the changes that is kept, the largest")
    trim: str = option(
        "tensor",
        "what the share is kept of: every tensor, or the model as a whole",
        choices=("tensor", "model"),
    )
    normalize: bool = option(True, "whether the agreeing changes are averaged rather than summed")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus elected changes."""
    return common.plan_changes(models, options, what="trimmed and combined", cuts=True)


def decide_from_weights(
    model: Any, options: Options, statistics: Any, weights: Weights, seed: int
) -> dict[str, Any]:
    """Where the largest changes of each whole model end; nothing where tensors are trimmed one by one."""
    return whole.decide(weights, options.density) if options.trim == "model" else {}


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import elected
    from ...linalg.selection import Taking

    params, blocks = (
        work.params,
        reading.Blocks(work, based=True, once=work.params["trim"] == "model"),
    )
    if params["trim"] == "model":
        cuts = whole.cuts(work.decision, work.unit.writes[0].tensor)
    else:
        kept = int(params["density"] * blocks.count)
        (cuts,) = reading.largest(blocks, len(params["weights"]), [kept])
    taking = [Taking(cut) for cut in cuts]
    conflicts = 0
    for block in blocks:
        trimmed = [takes.trim_(change) for change, takes in zip(block.tensors, taking, strict=True)]
        found = elected(trimmed, params["weights"], normalize=params["normalize"])
        conflicts += found.conflicts
        reading.put(work, block, found.merged, params["scale"])
    return {"conflicts": conflicts / max(1, blocks.count)}
