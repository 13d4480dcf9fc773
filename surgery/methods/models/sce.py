"""Select the elements on which fine-tunes differ most, weigh models by what they changed there, erase minority
signs.

SCE (arXiv:2408.07990, FuseChat). The first source is the base; for every tensor, with d_i = theta_i - theta_0:

    1. select: only the elements with the largest variance over the fine-tunes stay, a share ``density`` of those whose
       variance is not zero
    2. calculate: w_i = sum of squares of what stays of d_i, divided by that of all models
    3. erase: of each element only the d_i with the sign of their sum stay
    4. theta = theta_0 + scale (sum_i w_i d_i) / (sum of the w_i that stay)

At ``--density 1`` nothing is deselected, and equal fine-tunes give themselves; below, elements on which all
fine-tunes agree stay at the base, as published. mergekit divides by at least 1e-6 where we divide by the sum
itself. The variance is over the fine-tunes, biased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, Exactness, MethodInfo, option
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="select where fine-tunes differ, weigh by energy, erase minority signs",
    paper="arXiv:2408.07990",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    density: float = option(0.1, "share of each tensor that is selected, by variance")
    scale: float = option(1.0, "factor of the merged change before it is added to the base")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus selected changes."""
    notes = common.check(models, least=2, based=True)
    common.check_share("density", options.density)
    return common.plan_merge(
        models,
        {"density": options.density, "scale": options.scale},
        exactness=Exactness("approximate", "changes of fine-tunes are selected and combined"),
        notes=notes,
        tensors=2 * len(models) + 4,
        cuts=True,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    import torch

    from ...linalg.merge_rules import elected, sce_weights
    from ...linalg.selection import Taking, kth_largest

    params, blocks = work.params, reading.Blocks(work, based=True)

    def variance(block: reading.Block) -> torch.Tensor:
        return torch.stack(block.tensors).var(dim=0, unbiased=False)

    cut = None
    if params["density"] < 1:
        differ = sum(int(torch.count_nonzero(variance(block))) for block in blocks)
        cut = kth_largest(blocks.values(variance), blocks.count, int(params["density"] * differ))

    def selected(block: reading.Block, taking: Taking | None) -> list[torch.Tensor]:
        if taking is None:
            return block.tensors
        mask = taking.mask(variance(block))
        return [change * mask for change in block.tensors]

    energies = [0.0] * (len(work.models) - 1)
    taking = None if cut is None else Taking(cut)
    for block in blocks:
        for index, change in enumerate(selected(block, taking)):
            energies[index] += float(change.square().sum(dtype=torch.float64))
    weights = sce_weights(energies)
    taking = None if cut is None else Taking(cut)
    for block in blocks:
        changes = selected(block, taking)
        # Signs are elected by the plain sum, then what stays is weighed.
        sign = torch.where(sum(changes[1:], start=changes[0]) >= 0, 1.0, -1.0)
        kept = [change * (change.sign() == sign) for change in changes]
        reading.put(work, block, elected(kept, weights).merged, params["scale"])
    return {"weights": weights}
