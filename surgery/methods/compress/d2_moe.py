"""D2-MoE: one base matrix for all experts of a layer and a low-rank difference for each.

    W_e = W_b + U_e V_e,   W_b = sum_e f_e W_e,   U_e V_e = (W_e - W_b) cut to rank R

for gate, up and down (arXiv:2502.17298). Without text f_e is 1/E and the differences are cut in the Frobenius norm.
With text (``--data``, or ``--calibration`` of `calibrate --linear-grams`) f_e is the share of the routed tokens that
expert e takes, and the outputs' errors on the mixture's inputs (gate, up) or the expert's hidden activations (down)
decide what is cut.

Deviations: the paper weighs the base by the Fisher information of gradients, which an offline tool has not; it
whitens gate and up by the tokens an expert takes, ours by all tokens of the mixture; the columns of the base that it
drops at run time by batch stay. The whitening is the closed form of ``svd-llm`` without Cholesky factor. One rank for
all projections and layers removes the asked fraction of all numbers of the experts. Best for few large experts that
have a common origin, such as upcycled ones; experts that share no more than their shape have differences as large
as themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..base import Draft, MethodInfo, option
from ._expert_unit import grams, matrices, write_experts
from ._experts import (
    DAMPING_HELP,
    SharedOptions,
    delta_entries,
    plan_experts,
)
from ._options import check_damping

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...execute import Work

INFO = MethodInfo(
    summary="a base matrix for all experts and a low-rank difference for each",
    paper="arXiv:2502.17298",
    inputs="one mixture",
    data="gram",
    tier="custom",
    optional=True,
)


@dataclass(frozen=True)
class Options(SharedOptions):
    """What the user chooses."""

    base: str = option(
        "frequency",
        "how experts are weighed in the base; frequency is mean where there is no text",
        choices=("frequency", "mean"),
    )
    damping: float = option(1e-4, DAMPING_HELP)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """One rank for all experts.

    Raises:
        UsageError: an option out of range.
        InputError: no rank removes the asked fraction.
    """
    check_damping(options.damping)
    return plan_experts(
        models,
        options,
        entries_of=lambda model, sizes: delta_entries(model, sizes, options.ratio),
        params={"base": options.base, "damping": options.damping},
        memory=lambda sizes: 64 * max(sizes.hidden, sizes.width) ** 2,
    )


def decide(model: Model, options: Options, statistics: Grams, seed: int) -> dict[str, Any]:
    """Every expert's share of the tokens of its layer."""
    from ...architectures.linears import expert_input

    decided: dict[str, Any] = {}
    for layer in model.moe_layers:
        if layer.experts is None:
            raise InputError(f"layer {layer.index} has no experts")
        rows = [
            statistics.read(layer.index, expert_input(expert))[1]
            for expert in range(layer.experts.count)
        ]
        total = sum(rows)
        if not total:
            raise InputError(f"{statistics.folder}: no token reached the experts of {layer.prefix}")
        decided[str(layer.index)] = {"frequency": [count / total for count in rows]}
    return decided


def transform(work: Work) -> dict[str, object]:
    """Factorise one layer's experts."""
    import torch

    from ...linalg.sharing import Shifted, share_base

    found: dict[str, Shifted] = {}
    for part, entry in work.params["entries"].items():
        weights = matrices(work, part)
        share = [1 / len(weights)] * len(weights)
        if work.params["base"] == "frequency" and work.decision is not None:
            share = work.decision["frequency"]
        base = torch.zeros(weights[0].shape, dtype=torch.float64)
        for weight, size in zip(weights, share, strict=True):
            base += size * weight.double()
        found[part] = share_base(
            weights, base, entry["rank"], grams(work, part), damping=work.params["damping"]
        )
    return write_experts(work, found)
