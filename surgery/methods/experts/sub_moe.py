"""Sub-MoE: k-means on expert outputs, then a merge in the subspace the group's weights share.

Sub-MoE (arXiv:2506.23266). Stage 1: experts are clustered by their outputs on the calibration tokens, k-means
with k-means++ seeding on the stacked outputs. The clustering needs only inner products of outputs, which the
statistics hold, so it is exact without the outputs themselves. ``--metric cosine`` clusters by the mean cosine
of outputs (the paper's equation 2) instead of their Euclidean distance (its objective).

Stage 2: [W_1 ... W_n] = U S [V_1 ... V_n]^T and W = U S (sum of f_i V_i)^T / sum of f_i, with f the routing
frequencies. Since W_i = U S V_i^T exactly, this equals the frequency-weighted mean of the W_i, and that is what is
computed; a test holds it against the explicit decomposition. With ``--rank R`` (the paper's intra-expert form) it is
the W_i S_i that are decomposed together, S_i S_i^T = X_i^T X_i for what the tokens that select i give the projection,
and V_i S_i^-1 that are averaged. Whitening cancels but for the choice of the subspace: the result is U_R U_R^T times
the mean, with U_R the first R left singular vectors of [W_1 S_1 ... W_n S_n]. S_i is damped by 1e-4 of its mean
diagonal. ``--no-whiten`` takes those of [W_1 ... W_n]. It is written as a full matrix, so it saves nothing on disk.

What the paper leaves open, and the choices here: one grouping serves all three projections of an expert; the
representative of a group is its most used member; ``--allocation global`` replaces the joint clustering of
adjacent layers by the counts that minimise the summed k-means objective (relative to each layer's outputs) under
the same total, found exactly by dynamic programming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ...seeding import stream
from ..base import Draft, MethodInfo, option
from ._groups import from_labels
from ._merge import ROUTER_HELP, ROUTERS, plan_merge, settle_at_counts, undecided
from ._merge_unit import transform_merge
from ._reconstruct import ReconstructOptions, reconstruct_params

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics

INFO = MethodInfo(
    summary="k-means on expert outputs, then a frequency-weighted merge in the shared subspace",
    paper="arXiv:2506.23266",
    inputs="one mixture of experts",
    data="all-expert",
)


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    router: str = option("keep", ROUTER_HELP, choices=ROUTERS)
    metric: str = option(
        "euclidean", "distance between expert outputs", choices=("euclidean", "cosine")
    )
    rank: int | None = option(None, "truncate merged matrices to this rank (stored full)")
    whiten: bool = option(
        True, "choose what --rank keeps by what it does to sampled inputs, not by weights alone"
    )
    allocation: str = option(
        "uniform",
        "uniform: the same number of experts in every layer; global: counts that minimise the summed "
        "clustering objective, whose output loads in stock classes with --router tied or where padding is exact",
        choices=("uniform", "global"),
    )


def plan(models: Sequence[Model], options: Options, counts: dict[int, int] | None = None) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer, or as many as a global allocation gave each."""
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank should be at least 1, is {options.rank}")
    if options.rank is not None and options.reconstruct:
        raise UsageError(
            "--rank and --reconstruct exclude each other: solved down projections have full rank"
        )
    whitened = options.rank is not None and options.whiten
    params = {"router": options.router, "rank": options.rank, "whiten": whitened}
    draft = plan_merge(
        models,
        options,
        router=options.router,
        params={**params, **reconstruct_params(options)},
        sample=options.sample if options.reconstruct or whitened else 0,
        counts=counts,
    )
    waits = options.allocation == "global" and options.router != "tied" and counts is None
    return undecided(draft) if waits else draft


settle = settle_at_counts(plan)


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Groups of every layer, from inner products of expert outputs."""
    from ...linalg.allocation import allocate
    from ...linalg.clustering import inertia, kmeans, points_from_gram

    layers = {layer.index: statistics.layer(layer.index) for layer in model.moe_layers}
    points = {
        index: points_from_gram(_gram(found, options.metric, index))
        for index, found in layers.items()
    }
    seeds = {index: int(stream(seed, "sub-moe", index).integers(0, 2**31 - 1)) for index in layers}
    counts = dict.fromkeys(layers, options.experts)
    if options.allocation == "global":
        curves = {}
        for index, rows in points.items():
            scale = max(inertia(rows, [0] * len(rows)), 1e-300)
            curves[index] = {
                count: inertia(rows, kmeans(rows, count, seed=seeds[index])) / scale
                for count in range(model.rule.top_k, len(rows) + 1)
            }
        counts = allocate(curves, options.experts * len(layers))
    decided = {}
    for index, found in layers.items():
        labels = kmeans(points[index], counts[index], seed=seeds[index])
        objective = inertia(points[index], labels)
        usage = [float(count) for count in found.count_E]
        decided[str(index)] = from_labels(labels, usage, {"objective": objective}).to_json()
    return decided


transform = transform_merge


def _gram(layer: LayerStatistics, metric: str, index: int) -> NDArray[np.float64]:
    if float(layer.tokens) == 0:
        raise InputError(f"layer {index}: the statistics saw no token; calibrate on some text")
    return layer.output_gram_mean_EE if metric == "euclidean" else layer.output_cosine_mean_EE
