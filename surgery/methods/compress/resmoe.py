"""ResMoE: a centre of all experts, found after aligning their neurons, and a low-rank residual for each.

A neuron is its rows of gate and up and its column of down. The centre is the Wasserstein barycentre of the experts as
sets of neurons (arXiv:2503.06881): with T_e the permutation that brings expert e closest to the centre,

    centre = mean_e T_e W_e,   W_e' = centre + (T_e W_e - centre) cut to rank R,

both steps repeated until no permutation changes. The order of the neurons inside an expert does not change what it
computes, so nothing has to be undone.

Deviations: permutations come from linear assignment instead of an optimal-transport solver, which for as many
points on both sides is the same; residuals are cut by SVD, the paper's other choice, magnitude pruning, is left out.
Assignment costs the cube of an expert's width: seconds at 1,000 neurons, an hour and more at 14,000. No text is needed.
One rank for all projections and layers removes the asked fraction of all numbers of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, MethodInfo, option
from ._expert_unit import matrices, write_experts
from ._experts import (
    SharedOptions,
    delta_entries,
    plan_experts,
)

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="a centre of aligned experts and a low-rank residual for each",
    paper="arXiv:2503.06881",
    inputs="one mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(SharedOptions):
    """What the user chooses."""

    rounds: int = option(100, "alternations between alignment and centre at most")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """One rank for all experts.

    Raises:
        UsageError: an option out of range.
        InputError: no rank removes the asked fraction, or experts with biases, which neurons would take along.
    """
    if options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds} should be at least 1")
    refuse_biases(models)
    return plan_experts(
        models,
        options,
        entries_of=lambda model, sizes: delta_entries(model, sizes, options.ratio),
        params={"rounds": options.rounds},
        memory=lambda sizes: 8 * sizes.numbers + 64 * max(sizes.hidden, sizes.width) ** 2,
    )


def refuse_biases(models: Sequence[Model]) -> None:
    """Refuse experts with biases, which would have to be reordered with their neurons."""
    from ...architectures.base import PROJECTIONS
    from ...errors import InputError

    for model in models:
        if model.layout is not None and model.layout.parts != PROJECTIONS:
            raise InputError(f"{model.folder}: resmoe does not reorder the biases of experts")


def transform(work: Work) -> dict[str, object]:
    """Align and factorise one layer's experts."""
    import torch

    from ...linalg.barycentre import barycentre
    from ...linalg.sharing import share_base

    parts = {part: matrices(work, part) for part in work.params["entries"]}
    width = parts["gate"][0].shape[1]
    neurons = [
        torch.cat([gate_FD, up_FD, down_DF.T], dim=1)
        for gate_FD, up_FD, down_DF in zip(*(parts[p] for p in ("gate", "up", "down")), strict=True)
    ]
    found = barycentre(neurons, work.params["rounds"])
    norm = sum(float(one.double().square().sum()) for one in neurons) / len(neurons)
    del neurons
    centres = dict(
        zip(("gate", "up", "down"), found.centre_FN.reshape(-1, 3, width).unbind(1), strict=True)
    )
    centres["down"] = centres["down"].T
    aligned = {
        part: [
            weight[:, order] if part == "down" else weight[order]
            for weight, order in zip(weights, found.orders, strict=True)
        ]
        for part, weights in parts.items()
    }
    del parts
    made = {
        part: share_base(weights, centres[part].contiguous(), work.params["entries"][part]["rank"])
        for part, weights in aligned.items()
    }
    metrics = write_experts(work, made, lambda part, expert: aligned[part][expert])
    return {
        **metrics,
        "residual": (found.losses[-1] / norm) ** 0.5 if norm else 0.0,
        "rounds": len(found.losses),
    }
