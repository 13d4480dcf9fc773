"""Drop the largest and the smallest changes of fine-tunes and add up the middle.

Model Breadcrumbs (arXiv:2312.06795). The first source is the base, d_i = theta_i - theta_0. In each tensor of n
elements the floor(gamma n) largest magnitudes of d_i are taken for outliers and dropped, of the rest the
floor(density n) largest stay, and

    theta = theta_0 + scale sum_i w_i d_i

``--elect`` merges by elected signs as TIES does (mergekit's ``breadcrumbs_ties``, which sums what agrees:
``--no-normalize``). If density and gamma leave too few elements, fewer outliers are dropped, so that the share kept
is ``density``; a tensor with fewer than 1 / gamma elements loses no outlier. Ties are by position. Selection is by
tensor, as published by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="drop the largest and the smallest changes, add up the middle",
    paper="arXiv:2312.06795",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.ChangeOptions):
    """What the user chooses."""

    density: float = option(0.15, "share of each tensor's changes that is kept")
    gamma: float = option(0.01, "share of each tensor's largest changes that is dropped")
    elect: bool = option(
        False, "whether signs are elected as in TIES before the changes are merged"
    )
    normalize: bool = option(
        True, "whether changes that agree in an elected sign are averaged rather than summed"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus the middle of the changes."""
    common.check_share("gamma", options.gamma, zero=True)
    return common.plan_changes(models, options, what="trimmed and combined", cuts=True)


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import elected, weighted_sum
    from ...linalg.selection import Taking

    params, blocks = work.params, reading.Blocks(work, based=True)
    weights = params["weights"]
    kept = int(params["density"] * blocks.count)
    outliers = min(int(params["gamma"] * blocks.count), blocks.count - kept)
    both = [
        [Taking(cut) for cut in cuts]
        for cuts in reading.largest(blocks, len(weights), [outliers, outliers + kept])
    ]
    for block in blocks:
        left = []
        for change, top, all_of_them in zip(block.tensors, *both, strict=True):
            outside = top.mask(change)
            left.append(all_of_them.trim_(change).mul_(~outside))
        if params["elect"]:
            merged = elected(left, weights, normalize=params["normalize"]).merged
        else:
            merged = weighted_sum(left, weights)
        reading.put(work, block, merged, params["scale"])
    return {}
