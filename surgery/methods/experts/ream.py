"""REAM: the most salient experts absorb their most similar neighbours, aligned and weighted by saliency.

REAM (arXiv:2604.04356), in every layer:

1. Saliency S_i = mean of g_i |f_i| over the tokens that select i (REAP's), 0 replaced by the smaller of 0.5 and the
   smallest other. (The published code multiplies by the gate twice.)
2. Centroids: the N experts of largest S, ties to the lower index.
3. Similarity of two experts: the mean of their mean cosine of outputs over all tokens and the cosine of their router
   logits over all tokens. (The published code takes the cosine of averaged outputs.)
4. Pseudo-grouping: in order of decreasing S, each centroid absorbs the most similar experts that no one has
   absorbed, up to C members including itself, until none is left. So few centroids absorb many and most stay as they
   are; N must be at least E / C. ``--group-size 0`` sends every expert to its most similar centroid instead.
5. Members' neurons are matched to the centroid's by the distance of normalised activations plus that of normalised
   weights (``surgery/linalg/neuron_distance.py``). All experts are given the same sampled inputs. (The published
   code draws other tokens for each expert, which leaves the activations nothing in common; and it compares 64
   principal components of the weights, here it is all of them.)
6. E_c = sum of S_i E_i / sum of S_i over the group; the router keeps the centroids' rows.

The paper recomputes each layer's statistics behind the layers already merged: that is ``--sequential``. Without it all
layers use those of the original model, which one calibration serves for any number of merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option
from ._groups import Grouping, from_members
from ._merge import ROUTER_HELP, ROUTERS, plan_merge
from ._merge_unit import transform_merge
from ._reconstruct import ReconstructOptions, reconstruct_params

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics

INFO = MethodInfo(
    summary="the most salient experts absorb similar ones, neurons matched, weighted by saliency",
    paper="arXiv:2604.04356",
    inputs="one mixture of experts",
    data="all-expert",
)


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    router: str = option("keep", ROUTER_HELP, choices=ROUTERS)
    group_size: int = option(
        16, "most members of a group, 0 for no limit (each expert joins its most similar centroid)"
    )
    align: str = option(
        "both",
        "match neurons to the centroid's by weights, by activations on sampled inputs, by both, or not",
        choices=("both", "weight", "activation", "none"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer."""
    params = {
        "router": options.router,
        "align": options.align,
        "reference": "representative",
        "matching": "ream",
    }
    sampled = options.reconstruct or options.align in ("both", "activation")
    draft = plan_merge(
        models,
        options,
        router=options.router,
        params={**params, **reconstruct_params(options)},
        sample=options.sample if sampled else 0,
    )
    check_size(models[0], options.experts, options.group_size)
    return draft


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Groups of every layer. Uses no randomness."""
    decided = {}
    for layer in model.moe_layers:
        found = statistics.layer(layer.index)
        if not found.tokens:
            raise InputError(
                f"layer {layer.index}: the statistics saw no token; calibrate on some text"
            )
        similarity_EE = (found.output_cosine_mean_EE + found.logit_cosine_EE) / 2
        grouping = group(saliency(found), similarity_EE, options.experts, options.group_size)
        decided[str(layer.index)] = grouping.to_json()
    return decided


transform = transform_merge


def check_size(model: Model, groups: int, size: int) -> None:
    """Refuse groups that are too small to hold all experts.

    Raises:
        UsageError: the size is negative.
        InputError: it is too small.
    """
    if size < 0:
        raise UsageError(f"--group-size should not be negative, is {size}")
    if size and groups * size < model.experts:
        least = -(-model.experts // size)
        raise InputError(
            f"{model.folder}: {groups} groups of at most {size} do not hold {model.experts} experts",
            hint=f"use --experts {least} or more, or a larger --group-size",
        )


def saliency(layer: LayerStatistics) -> list[float]:
    """Mean of g |f| over the tokens that select an expert, zeros replaced."""
    found = [
        float(total / count) if count else 0.0
        for total, count in zip(layer.gate_norm_E, layer.count_E, strict=True)
    ]
    least = min([0.5, *(value for value in found if value > 0)])
    return [value if value > 0 else least for value in found]


def group(
    salience: Sequence[float], similarity_EE: NDArray[np.float64], kept: int, size: int
) -> Grouping:
    """Pseudo-grouping.

    Args:
        salience: of each expert, all positive.
        similarity_EE: [E, E].
        kept: centroids.
        size: most members of a group, the centroid included; 0 for no limit.
    """
    ranked = sorted(range(len(salience)), key=lambda expert: (-salience[expert], expert))
    centroids, free = ranked[:kept], sorted(ranked[kept:])
    members = {centroid: [centroid] for centroid in centroids}
    if size == 0:
        for expert in free:
            best = max(centroids, key=lambda other: (float(similarity_EE[expert, other]), -other))
            members[best].append(expert)
    else:
        for centroid in centroids:
            nearest = sorted(
                free, key=lambda other: (-float(similarity_EE[centroid, other]), other)
            )[: size - 1]
            members[centroid].extend(nearest)
            free = [expert for expert in free if expert not in nearest]
    themselves = {centroid: centroid for centroid in centroids}
    details = {"saliency": list(salience), "centroids": list(centroids)}
    return from_members(members, themselves, salience, details)
