"""Compose a merge from its parts: what experts are compared by, clustering, alignment, combination, router.

Every published merge is a choice on each of these axes, and any other choice is offered here. Per layer:

``--group-by``, with Gram matrix and cosines of
    router-logits   the experts' columns of raw router logits over all tokens (M-SMoE)
    router-rows     their rows of the router; needs no text
    outputs         their outputs on all tokens, stacked; the cosine is the mean of the tokens' (Sub-MoE, REAM)
    mean-outputs    their mean outputs over all tokens (HC-SMoE)
    weights         all their weights, flattened as they lie; needs no text
``--cluster`` into N groups
    dominant        around the N most used experts, each other one joining that of largest cosine (M-SMoE)
    hierarchical    agglomerative, by distance, ``--linkage`` (HC-SMoE)
    k-means         by distance (Sub-MoE)
    ream            pseudo-groups of at most ``--group-size`` around the N most salient, by cosine (REAM)
``--align`` neurons to those of the group's representative
    none; weight (one exact assignment on inner products of gate, up and down); activation (on normalised
    activations on sampled inputs, as in REAM)
``--combine`` members, each weighted by
    mean (equally); frequency (tokens that select it); saliency (mean of g ||f|| over these);
    least-squares (by frequency, and the down projection fitted to the members' outputs, as in MergeMoE)
``--router``
    as in every merge

The representative is the group's centre where there is one, otherwise its most used member, and without text the
member nearest to the mean of the group. ``--reconstruct`` solves for the layer afterwards.

The presets are compositions: ``hc-smoe`` is mean-outputs, hierarchical, none, frequency; ``sub-moe`` is outputs,
k-means, none, frequency; ``m-smoe --align none`` is router-logits, dominant, none, frequency (with alignment it aligns
to the layer's first expert instead); ``ream`` compares by the mean of two bases and matches by two; ``mergemoe``
compares gate and up alone. How much text is needed follows from the choices: none, routing statistics, or outputs of
all experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.reader import TensorReader
from ...errors import InputError, UsageError
from ...seeding import stream
from .._mixture import mixture
from ..base import DataNeed, Draft, MethodInfo, option
from ._compare import BASES, compare
from ._groups import Grouping, around, from_labels, from_members, reweighted
from ._merge import ROUTER_HELP, ROUTERS, plan_merge
from ._merge_unit import transform_merge
from ._reconstruct import ReconstructOptions, reconstruct_params
from .ream import check_size, group, saliency

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics
    from ...weights import Weights
    from ._compare import Compared

INFO = MethodInfo(
    summary="choose what experts are compared by, clustering, alignment, combination and router one by one",
    paper="",
    inputs="one mixture of experts",
    data="all-expert",
)
CLUSTERS = ("dominant", "hierarchical", "k-means", "ream")
ALIGNS = ("none", "weight", "activation")
COMBINES = ("mean", "frequency", "saliency", "least-squares")


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    group_by: str = option("outputs", "what experts are compared by", choices=BASES)
    cluster: str = option("ream", "how they are grouped", choices=CLUSTERS)
    align: str = option(
        "weight", "what members' neurons are matched to the representative's by", choices=ALIGNS
    )
    combine: str = option("saliency", "how members become one expert", choices=COMBINES)
    router: str = option("keep", ROUTER_HELP, choices=ROUTERS)
    linkage: str | None = option(
        None,
        "which distance of two clusters counts, with --cluster hierarchical (default average)",
        choices=("average", "complete", "single", "ward"),
    )
    group_size: int | None = option(
        None, "most members of a group, with --cluster ream (default 16), 0 for no limit"
    )
    merge_ridge: float | None = option(
        None,
        "pull towards the averaged down projection in units of the mean diagonal, with --combine least-squares "
        "(default 0.01)",
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer.

    Raises:
        UsageError: an option of a part that was not chosen.
        InputError: the model or its family excludes a choice.
    """
    for name, value, axis, chosen, needed in (
        ("--linkage", options.linkage, "--cluster", options.cluster, "hierarchical"),
        ("--group-size", options.group_size, "--cluster", options.cluster, "ream"),
        ("--merge-ridge", options.merge_ridge, "--combine", options.combine, "least-squares"),
    ):
        if value is not None and chosen != needed:
            raise UsageError(
                f"{name} belongs to {axis} {needed}, and {axis} is {chosen}",
                hint=f"leave out {name}, or use {axis} {needed}",
            )
    if options.merge_ridge is not None and not options.merge_ridge >= 0:
        raise UsageError(f"--merge-ridge should not be negative, is {options.merge_ridge:g}")
    params: dict[str, Any] = {
        "router": options.router,
        "align": options.align,
        "reference": "representative",
    }
    if options.align == "activation":
        params["matching"] = "ream"
    if options.combine == "least-squares":
        ridge = 0.01 if options.merge_ridge is None else options.merge_ridge
        params |= {"combine": "least-squares", "combine_ridge": ridge}
    params |= reconstruct_params(options)
    sampled = options.align == "activation" or "combine" in params or options.reconstruct
    draft = plan_merge(
        models,
        options,
        router=options.router,
        params=params,
        sample=options.sample if sampled else 0,
    )
    if options.cluster == "ream":
        check_size(models[0], options.experts, _size(options))
    data = need(options, sampled or options.budget == "global")
    if options.sequential and data == "none":
        raise UsageError(
            "--sequential changes nothing where these choices need no text",
            hint="add --reconstruct",
        )
    return dataclasses.replace(draft, data=data)


def need(options: Options, sampled: bool) -> DataNeed:
    """The least statistics that the choices need."""
    if options.group_by in ("outputs", "mean-outputs"):
        return "all-expert"
    blind = (
        options.group_by != "router-logits"
        and options.cluster in ("hierarchical", "k-means")
        and options.combine == "mean"
        and not sampled
    )
    return "none" if blind else "routed"


def decide_from_weights(
    model: Model, options: Options, statistics: Statistics | None, weights: Weights, seed: int
) -> dict[str, Any]:
    """Groups of every layer; only k-means draws."""
    decided = {}
    with TensorReader(model.checkpoint) as reader:
        for layer in weights.track(model.moe_layers):
            found = None if statistics is None else statistics.layer(layer.index)
            if found is not None and not found.count_E.sum():
                raise InputError(
                    f"layer {layer.index}: the statistics saw no token; calibrate on some text"
                )
            compared = compare(reader, mixture(layer), found, options.group_by)
            draw = int(stream(seed, "sub-moe", layer.index).integers(0, 2**31 - 1))
            grouping = _group(compared, found, options, draw)
            shares = _shares(found, options.combine, model.experts)
            decided[str(layer.index)] = reweighted(grouping, shares).to_json()
    return decided


transform = transform_merge


def _size(options: Options) -> int:
    return 16 if options.group_size is None else options.group_size


def _group(
    compared: Compared, found: LayerStatistics | None, options: Options, draw: int
) -> Grouping:
    from ...linalg.agglomeration import agglomerate
    from ...linalg.clustering import kmeans

    count = len(compared.points_ED)
    usage = [0.0] * count if found is None else [float(value) for value in found.count_E]
    if options.cluster == "dominant":
        ranked = sorted(range(count), key=lambda expert: (-usage[expert], expert))
        return around(sorted(ranked[: options.experts]), compared.cosine_EE, usage)
    if options.cluster == "ream":
        if found is None:
            raise InputError("--cluster ream needs statistics")
        return group(saliency(found), compared.cosine_EE, options.experts, _size(options))
    if options.cluster == "hierarchical":
        labels = agglomerate(compared.points_ED, options.experts, options.linkage or "average")
    else:
        labels = kmeans(compared.points_ED, options.experts, seed=draw)
    return from_labels(labels, usage) if found is not None else _nearest(compared, labels)


def _nearest(compared: Compared, labels: Sequence[int]) -> Grouping:
    """Groups represented by the member nearest to their mean, ties to the lowest index."""
    import numpy as np

    members: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        members.setdefault(label, []).append(expert)
    representative = {}
    for label, group_ in members.items():
        points = compared.points_ED[group_]
        # Rounded, so that two members of a group, always equally far, tie wherever this runs.
        far = np.linalg.norm(points - points.mean(axis=0), axis=1).round(9)
        representative[label] = group_[int(far.argmin())]
    return from_members(members, representative, [1.0] * len(labels))


def _shares(found: LayerStatistics | None, combine: str, experts: int) -> list[float]:
    """What members are weighted by."""
    if combine == "mean":
        return [1.0] * experts
    if found is None:
        raise InputError(f"--combine {combine} needs statistics")
    if combine == "saliency":
        return saliency(found)
    return [float(value) for value in found.count_E]
