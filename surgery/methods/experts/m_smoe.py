"""M-SMoE: align neurons, group experts around the most used ones by router-logit similarity, average by use.

Merge, Then Compress (arXiv:2310.01334), Algorithm 1, without the gradient-based compression of MC-SMoE:

1. A = activation counts over the calibration tokens, normalised in each layer; the most used expert of a layer
   counts as 1 in the selection, so that every layer keeps one.
2. Dominant experts: the most used. ``uniform`` takes N in every layer, which stock loaders need; ``global`` is
   the paper's: the K = N x layers most used of the whole model, by (A, layer, index), exactly K of them. (The
   published code drops experts that tie with the K-th.)
3. Every expert of a layer is permuted to match expert 0 (weight matching; ``surgery/linalg/permutation.py``),
   before and independently of grouping. The published Mixtral script leaves this out.
4. Q(i) = the dominant j with the largest cosine between the columns of raw router logits of i and j over all
   tokens; dominants keep to themselves.
5. E_d = sum of A_i E_i / sum of A_i over the group, with the counts as measured (the 1 of step 1 is a device of
   the selection only). A group that no token used is averaged uniformly.

The paper leaves the router as it is and points several rows at one expert: that is ``--router tied``. The
default, ``keep``, writes N rows and a folder that is really smaller; it is not the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from .._layers import LayerOptions
from ..base import Draft, MethodInfo, option
from ._groups import around
from ._merge import ROUTER_HELP, ROUTERS, plan_merge, settle_at_counts, undecided
from ._merge_unit import transform_merge
from ._reconstruct import ReconstructOptions, reconstruct_params

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics

INFO = MethodInfo(
    summary="group experts around the most used by router-logit cosine, align neurons, average by use",
    paper="arXiv:2310.01334",
    inputs="one mixture of experts",
    data="routed",
)
ALLOCATION_HELP = (
    "uniform: the same number of experts in every layer; global: the paper's allocation over the "
    "whole model, which may leave a layer fewer experts than a token selects: needs --router tied or mapped"
)


@dataclass(frozen=True, kw_only=True)
class Grouped(LayerOptions):
    """The options of all methods that begin with this merge."""

    router: str = option("keep", ROUTER_HELP, choices=ROUTERS)
    align: str = option(
        "weight", "permute neurons to match expert 0 before averaging", choices=("weight", "none")
    )
    allocation: str = option("uniform", ALLOCATION_HELP, choices=("uniform", "global"))


@dataclass(frozen=True, kw_only=True)
class Options(Grouped, ReconstructOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options, counts: dict[int, int] | None = None) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer, or as many as a global allocation gave each."""
    return plan_grouped(
        models,
        options,
        counts=counts,
        params=reconstruct_params(options),
        sample=options.sample if options.reconstruct else 0,
    )


settle = settle_at_counts(plan)


def plan_grouped(
    models: Sequence[Model],
    options: Grouped,
    *,
    counts: dict[int, int] | None,
    params: Mapping[str, Any],
    sample: int = 0,
) -> Draft:
    """The plan of this merge, for all methods that begin with it.

    Args:
        counts: experts by layer, once they are decided.
        params: what else is done with a merged expert; see ``plan_merge``.
        sample: rows of each mixture's input that it needs.
    """
    allocation, router = options.allocation, options.router
    if allocation == "global" and router not in ("tied", "mapped"):
        raise UsageError(
            "--allocation global may leave a layer fewer experts than a token selects, which only a router that "
            "keeps all of its rows works with",
            hint="add --router tied or mapped, or use --allocation uniform",
        )
    draft = plan_merge(
        models,
        options,
        router=router,
        params={"align": options.align, "router": router, **params},
        sample=sample,
        counts=counts,
    )
    waits = allocation == "global" and router != "tied" and counts is None
    return undecided(draft) if waits else draft


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Groups of every layer, from usage counts and router logits. Uses no randomness."""
    return decide_groups(model, options, statistics, seed)


def decide_groups(
    model: Model, options: Grouped, statistics: Statistics, seed: int
) -> dict[str, Any]:
    """Groups of every layer, for all methods that begin with this merge."""
    layers = {layer.index: statistics.layer(layer.index) for layer in model.moe_layers}
    usage = {index: _usage(found, index) for index, found in layers.items()}
    if options.allocation == "global":
        dominant = _global(usage, options.experts * len(usage))
    else:
        dominant = {index: _most_used(used, options.experts) for index, used in usage.items()}
    return {
        str(index): around(dominant[index], found.logit_cosine_EE, usage[index]).to_json()
        for index, found in layers.items()
    }


transform = transform_merge


def _usage(layer: LayerStatistics, index: int) -> list[float]:
    total = float(layer.count_E.sum())
    if total == 0:
        raise InputError(f"layer {index}: the statistics saw no token; calibrate on some text")
    return [float(count / total) for count in layer.count_E]


def _most_used(usage: list[float], count: int) -> list[int]:
    ranked = sorted(range(len(usage)), key=lambda expert: (-usage[expert], expert))
    return sorted(ranked[:count])


def _global(usage: dict[int, list[float]], total: int) -> dict[int, list[int]]:
    """The ``total`` most used experts of the model, each layer's first counted as 1."""
    ranked: list[tuple[float, int, int]] = []
    for layer, used in usage.items():
        first = _most_used(used, 1)[0]
        for expert, share in enumerate(used):
            ranked.append((-(1.0 if expert == first else share), layer, expert))
    chosen: dict[int, list[int]] = {layer: [] for layer in usage}
    for _, layer, expert in sorted(ranked)[:total]:
        chosen[layer].append(expert)
    return {layer: sorted(experts) for layer, experts in chosen.items()}
