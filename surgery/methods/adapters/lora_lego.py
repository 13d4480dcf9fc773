"""LoRA-LEGO: cluster the ranks of all adapters and make each cluster one rank of the result.

A rank is the vector p_j = [a_j ; b_j], a row of A and the column of B that belongs to it. All ranks of all adapters are
pooled in each module and grouped by k-means into k clusters C:

    mu_C = mean of p_j in C,   then   mu_C <- mu_C (mean of |p_j| in C) / |mu_C|    against the shrinking of averages
    A' = [a-part of mu_C],   B' = sqrt(r / k) [b-part of mu_C]         against the growth of the variance with k

Zhao et al., arXiv:2409.16167, ICLR 2025. No official code was published; where the paper leaves a choice open, ours
are:

* the norm of the rescaling is the largest absolute entry of the whole vector (``--norm inf``, as the one public
  re-implementation has it); ``l2`` is the Euclidean one. Assignment uses the vectors as they are (``--features raw``);
* k is ``--rank``, by default the largest rank of an adapter in the module, or the smallest rank that keeps
  ``--k-energy`` of the squared singular values of the sum; more clusters than ranks are an error unless
  ``--clamp-rank`` allows fewer;
* r, where ranks differ, is their mean (``--reference-rank``);
* clusters of opposite vectors cancel to zero, are written as zeros and counted;
* k-means++ with ten restarts and a seed drawn from ``--seed``.

The result depends on how each product B A is split into ranks: flipping the sign of a rank alone changes a merge of
identical adapters by half. ``--gauge balance`` (default) gives every rank equal norms and a fixed sign first; ``svd``
also removes any rotation of the ranks; ``none`` is the paper's. Weights multiply both halves by the root of |w| and a
by its sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Adapter, Module
    from ...execute import Work
    from ...linalg.gauge import Pair
    from ...weights import Weights

INFO = MethodInfo(
    summary="cluster the ranks of all adapters; each cluster becomes one rank",
    paper="arXiv:2409.16167",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)

CANCELLED = 1e-8
"""Centroids shorter than this part of the mean length of their members are taken for zero."""


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    rank: int | None = option(
        None, "clusters, and so the rank of every module; by default the largest of an adapter"
    )
    k_energy: float | None = option(
        None, "instead of --rank: as many clusters as ranks keep this share of the sum's energy"
    )
    gauge: str = option(
        "balance",
        "how the factors are made comparable first",
        choices=("none", "balance", "svd"),
    )
    features: str = option(
        "raw",
        "what is clustered: the vectors, their two halves normalised, or the vectors normalised",
        choices=("raw", "halves", "unit"),
    )
    norm: str = option("inf", "norm that centroids are rescaled to", choices=("inf", "l2"))
    rescale: bool = option(True, "rescale centroids to their members' mean norm")
    rescale_output: bool = option(True, "multiply by sqrt(r / k)")
    reference_rank: str = option(
        "mean", "r of sqrt(r / k) where ranks differ: mean, max or a number"
    )
    clamp_rank: bool = option(False, "allow fewer clusters where a module has fewer ranks")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the number of clusters.

    Raises:
        UsageError: an option out of range, or more clusters than ranks.
    """
    return _plan(adapters, options, None)


def decide_from_weights(
    model: Any, options: Options, statistics: Any, weights: Weights, seed: int
) -> dict[str, Any]:
    """The numbers of clusters that keep the wanted energy."""
    if options.k_energy is None:
        return {}
    return ranks.decide_ranks(weights, options, options.k_energy)


def settle(adapters: Sequence[Adapter], options: Options, decisions: Any) -> Draft | None:
    """The plan at the decided numbers of clusters."""
    return _plan(adapters, options, decisions["None"]) if decisions else None


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Cluster one module's ranks."""
    params = work.params
    rng = work.rng("kmeans", params["module"])

    def merged(pairs: list[Pair], weights: list[float]) -> tuple[Pair, dict[str, object]]:
        seed = int(rng.integers(0, 2**31 - 1))
        return lego(pairs, weights, params["rank"], seed=seed, **params["lego"])

    return unit.merge_each(work, merged)


def lego(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    clusters: int,
    *,
    seed: int,
    gauge: str,
    features: str,
    norm: str,
    rescale: bool,
    rescale_output: bool,
    reference_rank: str,
) -> tuple[Pair, dict[str, object]]:
    """The merge of one module.

    Args:
        pairs: factors A [r_i, n] and B [m, r_i], scales folded in, float64.
        weights: one each.
        clusters: k; with fewer distinct ranks, as many as these.
        seed: of k-means.

    Returns:
        A' [k, n] and B' [m, k], and what was found: sizes of the clusters, dead ranks, cancelled clusters, purity (the
        mean share of a cluster's most frequent adapter).
    """
    import math

    import torch

    from ...linalg import gauge as gauges

    chosen, owners, dead = [], [], 0
    for index, (pair, weight) in enumerate(zip(pairs, weights, strict=True)):
        if gauge == "svd":
            pair = gauges.canonical(pair)
        found, lost = gauges.alive(pair)
        dead += lost
        if gauge != "none":
            found = gauges.fix_signs(gauges.balance(found))
        root = math.sqrt(abs(weight))
        if root:
            down, up = found[0] * math.copysign(root, weight), found[1] * root
            chosen.append(torch.cat([down, up.T], dim=1))
            owners += [index] * len(down)
    width = pairs[0][0].shape[1]
    points = torch.cat(chosen) if chosen else pairs[0][0].new_zeros(0, width + len(pairs[0][1]))
    reference = _reference(reference_rank, [len(down) for down, _ in pairs])
    if not len(points):
        empty = (points.new_zeros(0, width), points.new_zeros(pairs[0][1].shape[0], 0))
        return empty, {"clusters": [], "dead_ranks": dead, "cancelled": 0}
    labels = _labels(_featured(points, width, features), clusters, seed)
    centroids, sizes, cancelled, purity = [], [], 0, 0.0
    for label in range(max(labels) + 1):
        members = [index for index, found_label in enumerate(labels) if found_label == label]
        rows = points[members]
        centre = rows.mean(dim=0)
        order = float("inf") if norm == "inf" else 2.0
        lengths = torch.linalg.vector_norm(rows, order, dim=1)
        length = torch.linalg.vector_norm(centre, order)
        if float(length) <= CANCELLED * float(lengths.mean()):
            centre, cancelled = torch.zeros_like(centre), cancelled + 1
        elif rescale:
            centre = centre * (lengths.mean() / length)
        centroids.append(centre)
        sizes.append(len(members))
        mine = [owners[index] for index in members]
        purity += max(mine.count(owner) for owner in set(mine)) / len(points)
    merged = torch.stack(centroids)
    # With fewer distinct ranks than clusters, k is what there is.
    scale = math.sqrt(reference / len(centroids)) if rescale_output else 1.0
    down, up = merged[:, :width], merged[:, width:].T * scale
    return (down, up), {
        "clusters": sizes,
        "dead_ranks": dead,
        "cancelled": cancelled,
        "purity": purity,
    }


def _labels(points: torch.Tensor, clusters: int, seed: int) -> list[int]:
    """Labels of at most ``clusters`` clusters, one for each distinct point where there are fewer."""
    import torch

    from ...linalg.clustering import kmeans

    distinct = len(torch.unique(points.round(decimals=12), dim=0))
    return kmeans(points.numpy(), min(clusters, distinct), seed=seed)


def _featured(points: torch.Tensor, width: int, features: str) -> torch.Tensor:
    import torch

    if features == "raw":
        return points
    parts = [points] if features == "unit" else [points[:, :width], points[:, width:]]
    normalised = [part / part.norm(dim=1, keepdim=True).clamp_min(1e-300) for part in parts]
    return torch.cat(normalised, dim=1)


def _reference(chosen: str, sizes: Sequence[int]) -> float:
    if chosen == "mean":
        return sum(sizes) / len(sizes)
    return float(max(sizes)) if chosen == "max" else float(chosen)


def _plan(adapters: Sequence[Adapter], options: Options, decided: Any) -> Draft:
    if options.reference_rank not in ("mean", "max"):
        digits = options.reference_rank.isdigit() and int(options.reference_rank) > 0
        if not digits:
            raise UsageError(
                f"--reference-rank {options.reference_rank!r} should be mean, max or a positive number"
            )
    find = ranks.chosen_rank(options.rank, options.k_energy, decided)

    def rank(modules: list[Module]) -> int:
        total = sum(module.rank for module in modules)
        if options.rank is not None and options.rank > total and not options.clamp_rank:
            raise UsageError(
                f"--rank {options.rank} is more clusters than module {modules[0].name} has ranks ({total})",
                hint="use a smaller --rank, or --clamp-rank",
            )
        return find(modules)

    keys = (
        "gauge",
        "features",
        "norm",
        "rescale",
        "rescale_output",
        "reference_rank",
    )
    return common.plan_merge(
        adapters,
        options,
        rank=rank,
        params={"lego": {key: getattr(options, key) for key in keys}},
        exactness=Exactness("approximate", "ranks that are alike are averaged"),
        memory=12,
    )
