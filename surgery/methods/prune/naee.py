"""NAEE: try every set of experts and drop the one whose absence changes the layer's output least.

Not All Experts are Equal (arXiv:2402.14800), the layer-wise expert pruning. On sampled inputs x of each mixture,
taken from the original model in all layers, with Z the routed output and Z_S the output without the experts S:

    loss(S) = sum over batches of ||Z - Z_S||_F

over every S of the asked-for size; the smallest wins, of those equal up to rounding the first in lexicographic
order. Without S means what the pruned model does: the router chooses among the kept experts and its weights are
renormalised over them. Shared experts add the same to both sides and drop out. The rows are cut into 16
consecutive batches of norms that are added, not squared (with one batch it would be the norm of all).

Each expert is read once and applied to the samples in float32; the outputs of a token are then written in an
orthonormal basis of their span, so that trying a set costs the same whatever the width of the model. The number
of sets grows fast: 28 for 6 of 8, 12,870 for 8 of 16. More than 20,000 are refused before calibration.

The paper's dynamic skipping of experts and its progressive variant, which recomputes inputs after each pruned
layer, are not done. ``--unseen`` concerns experts that no calibration token selects; ``prune`` lets the search
judge them like any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.routing import route
from ...errors import InputError, UsageError
from .._mixture import mixture
from ..base import Draft, MethodInfo, option
from ..experts._function import require_plain
from ..experts._reconstruct import ReconstructOptions
from ._keep import candidates, groups_of, subsets
from ._prune import plan_prune, transform_prune
from ._saliency import PROTECT, PROTECT_HELP, UNSEEN, constraints

if TYPE_CHECKING:
    import torch

    from ...architectures.base import RouterRule
    from ...architectures.model import Experts, Model
    from ...calibration.statistics import Statistics
    from ...weights import Weights

    Choices = Sequence[tuple[list[int], int]]

INFO = MethodInfo(
    summary="drop the set of experts whose absence changes the layer's output least, by trying all",
    paper="arXiv:2402.14800",
    inputs="one mixture of few experts",
    data="routed",
)
LARGEST = 20_000
"""Most sets a layer is searched for."""

BATCHES = 16
BASIS_BYTES = 256 << 20
"""Most bytes of outputs whose span is found at a time."""

ROUNDING = 1e-12
"""Losses closer than this share of the output's norm count as equal."""


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    samples: int = option(
        1024, "inputs of each mixture to compare outputs on, evenly spread over the text"
    )
    protect: str = option("none", PROTECT_HELP, choices=PROTECT)
    unseen: str = option(
        "prune",
        "experts that no calibration token selects: let the search judge them like any other (prune), keep "
        "them, or stop with an error",
        choices=UNSEEN,
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    if options.samples < 1:
        raise UsageError(f"--samples should be at least 1, is {options.samples}")
    draft = plan_prune(models, options.experts, options)
    (model,) = models
    require_plain(model)
    if model.layout is not None and (model.layout.router_bias or model.layout.correction):
        raise InputError(
            f"{model.folder}: the router of {model.family.model_type} has biases, and naee searches without them",
            hint="use --method hope or reap",
        )
    sets = math.comb(model.experts, options.experts)
    if sets > LARGEST:
        raise InputError(
            f"{model.folder}: there are {sets:,} ways to keep {options.experts} of {model.experts} "
            f"experts, naee tries at most {LARGEST:,}",
            hint="use --method hope or reap",
        )
    return dataclasses.replace(draft, sample=max(options.samples, draft.sample))


def decide_from_weights(
    model: Model, options: Options, statistics: Statistics | None, weights: Weights, seed: int
) -> dict[str, Any]:
    """The set with the smallest loss in every layer. Uses no randomness."""
    import torch

    if statistics is None:
        raise InputError("naee needs statistics")
    limits = constraints(model, statistics, options.protect, options.unseen)
    decided = {}
    for layer in weights.track(model.moe_layers):
        index, limit = layer.index, limits[layer.index]
        choices = candidates(
            model.experts,
            options.experts,
            groups=groups_of(model).count,
            forced=limit.forced,
            where=f"layer {index}",
        )
        stored, _ = statistics.inputs(index)
        samples = min(options.samples, len(stored))
        places = [place * len(stored) // samples for place in range(samples)]
        rows_TD = torch.from_numpy(stored[places])
        experts = mixture(layer)
        logits_TE = rows_TD @ weights.read(experts.router).float().T
        basis_TRE = coordinates(outputs(weights, experts, rows_TD, _activation(model)))
        total, losses = search(logits_TE, basis_TRE, model.rule, choices)
        best = min(losses.values())
        dropped = next(s for s, loss in losses.items() if loss <= best + ROUNDING * total)
        decided[str(index)] = {
            "kept": [expert for expert in range(model.experts) if expert not in dropped],
            "loss": losses[dropped],
            "relative_loss": losses[dropped] / total if total else 0.0,
            "searched": len(losses),
            "samples": samples,
            **limit.to_json(),
        }
    return decided


transform = transform_prune


def outputs(
    weights: Weights, experts: Experts, rows_TD: torch.Tensor, activation: Any
) -> torch.Tensor:
    """Every expert's output on every row: [T, E, D] float32."""
    import torch

    found_TED = torch.empty(len(rows_TD), experts.count, experts.hidden)
    for expert in range(experts.count):
        gate_TF = rows_TD @ weights.read(experts.region(expert, "gate")).float().T
        up_TF = rows_TD @ weights.read(experts.region(expert, "up")).float().T
        down_DF = weights.read(experts.region(expert, "down")).float()
        found_TED[:, expert] = (activation(gate_TF) * up_TF) @ down_DF.T
    return found_TED


def coordinates(output_TED: torch.Tensor) -> torch.Tensor:
    """Each token's outputs in an orthonormal basis of their span: [T, R, E] float64, R = min(D, E)."""
    import torch

    tokens, experts, hidden = output_TED.shape
    block = max(1, BASIS_BYTES // (8 * experts * hidden))
    return torch.cat(
        [
            torch.linalg.qr(output_TED[start : start + block].double().transpose(1, 2), "r").R
            for start in range(0, tokens, block)
        ]
    )


def search(
    logits_TE: torch.Tensor, basis_TRE: torch.Tensor, rule: RouterRule, choices: Choices
) -> tuple[float, dict[tuple[int, ...], float]]:
    """The norm of the output, and the loss of every set to drop in lexicographic order.

    Args:
        logits_TE: raw router logits.
        basis_TRE: outputs of the experts, in any orthonormal basis.
        choices: from :func:`candidates`.
    """
    import torch

    tokens, experts = logits_TE.shape
    before_TE = dense_weights(logits_TE, rule, range(experts))
    batches = torch.arange(tokens) * BATCHES // tokens

    def norm(weight_TE: torch.Tensor) -> float:
        square_T = torch.matmul(basis_TRE, weight_TE[:, :, None]).square().sum(dim=(1, 2))
        sums = torch.zeros(BATCHES, dtype=torch.float64).index_add_(0, batches, square_T)
        return float(sums.sqrt().sum())

    found = {}
    for dropped in subsets(choices):
        kept = [expert for expert in range(experts) if expert not in dropped]
        found[dropped] = norm(before_TE - dense_weights(logits_TE, rule, kept))
    return norm(before_TE), found


def dense_weights(logits_TE: torch.Tensor, rule: RouterRule, kept: Sequence[int]) -> torch.Tensor:
    """The coefficient of every expert, [T, E] float64, where the router has only the kept ones."""
    import torch

    columns = torch.tensor(list(kept))
    weights_TK, index_TK = route(logits_TE[:, columns], rule)
    dense_TE = torch.zeros(logits_TE.shape, dtype=torch.float64)
    return dense_TE.scatter_(1, columns[index_TK], weights_TK.double())


def _activation(model: Model) -> Any:
    from transformers.activations import ACT2FN

    name = model.config.get("hidden_act")
    if not isinstance(name, str) or name not in ACT2FN:
        raise InputError(f"{model.config.where}: hidden_act {name!r} is not known")
    return ACT2FN[name]
