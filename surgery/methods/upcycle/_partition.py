"""Which neurons of a feed-forward go to which expert, and the router's rows that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _activity as activity

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ...execute import Work


@dataclass(frozen=True)
class Parts:
    """A division of neurons.

    Attributes:
        always: int64, ascending: those of the shared expert.
        members_EN: those of every routed expert, ascending.
        metrics: what the report tells of the division.
        centres_ED: means of the members' normalised gate rows, float64, from k-means.
        representatives: one neuron of every expert, from activity.
        neurons: the sampled inputs with the layer's matrices, where text decided.
    """

    always: torch.Tensor
    members_EN: NDArray[np.int64]
    metrics: dict[str, object] = field(default_factory=dict)
    centres_ED: NDArray[np.floating[Any]] | None = None
    representatives: tuple[int, ...] = ()
    neurons: activity.Neurons | None = None


def divide(work: Work, rows: Sequence[torch.Tensor], shared: int) -> Parts:
    """Divide a layer's neurons as its unit's parameters say.

    Args:
        rows: gate, up and transposed down, [I, D] each.
        shared: neurons that are always on.
    """
    if work.params["by"] in ("coactivation", "cmoe"):
        return _by_activity(work, rows, shared)
    always, rest = _strongest(rows, shared)
    if work.params["by"] == "random":
        return Parts(always, _at_random(work, rest))
    return _by_weights(work, rows[0], always, rest)


def router(
    work: Work, rows: Sequence[torch.Tensor], parts: Parts, shape: tuple[int, ...]
) -> tuple[torch.Tensor, dict[str, object]]:
    """The router's rows [E, D], and what the report tells of them."""
    import numpy as np
    import torch

    params = work.params
    if params["router"] in ("analytic", "oracle"):
        neurons = parts.neurons or activity.Neurons.of(work, rows)
        chosen = parts.representatives or _representatives(work, neurons, parts.members_EN)
        return activity.router(
            neurons,
            parts.members_EN,
            chosen,
            params["top_k"],
            target=params["router"],
            ridge=params["ridge"],
            sharpness=params["sharpness"],
        )
    found = torch.zeros(shape)
    if params["router"] == "random":
        draw = work.rng("router", work.layer).standard_normal(shape, dtype="float32")
        found = torch.from_numpy(draw) * params["std"]
    elif parts.centres_ED is not None and params["router"] == "centroid":
        lengths = np.linalg.norm(parts.centres_ED, axis=1, keepdims=True)
        found = torch.from_numpy(parts.centres_ED / np.maximum(lengths, 1e-12))
    return found * params["sharpness"], {}


def memory(neurons: int, routed: int, hidden: int, by: str, tokens: int) -> int:
    """Bytes at the peak.

    Matrices as float32 with their selections; for clusters, points (rows of gate, or marks), distances and the
    assignment's P x P cost in float64; by activity the sample twice in float64, marks as bool, float32 and float64,
    and a block of activations.
    """
    held = 4 * 5 * neurons * hidden
    if by != "random":
        width = hidden if by == "kmeans" else 2
        held += 8 * (3 * routed * width + 2 * routed**2)
    if tokens:
        held += tokens * (20 * hidden + (16 * neurons if by in ("coactivation", "cmoe") else 0))
        held += 4 * 3 * activity.BLOCK * neurons
    return held


def _at_random(work: Work, rest: torch.Tensor) -> NDArray[np.int64]:
    import numpy as np

    order = rest.numpy()[work.rng("partition", work.layer).permutation(len(rest))]
    found: NDArray[np.int64] = np.sort(order.reshape(work.params["experts"], -1), axis=1)
    return found


def _by_weights(
    work: Work, gate_ID: torch.Tensor, always: torch.Tensor, rest: torch.Tensor
) -> Parts:
    import numpy as np

    from ...linalg.balanced import balanced_kmeans

    points = gate_ID.index_select(0, rest).double().numpy()
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    rng = work.rng("partition", work.layer)
    found = balanced_kmeans(
        points, work.params["experts"], rng, iterations=work.params["iterations"]
    )
    total = float(np.square(points - points.mean(axis=0)).sum())
    metrics: dict[str, object] = {
        "kmeans_steps": len(found.inertia),
        # 1 for a partition that explains nothing, 0 for equal rows within every cluster.
        "variance_left": found.inertia[-1] / total if total else 0.0,
    }
    members: Any = rest.numpy()[found.members_KN]
    return Parts(always, members, metrics, centres_ED=found.centres_KD)


def _by_activity(work: Work, rows: Sequence[torch.Tensor], shared: int) -> Parts:
    import torch

    from ...linalg.coactivation import coactive_groups, hot_clusters

    params = work.params
    neurons = activity.Neurons.of(work, rows)
    marks_NI = activity.active(neurons, params["by"], params["active"])
    rate_I = marks_NI.sum(dim=0)
    order = torch.argsort(rate_I, descending=True, stable=True)
    always, rest = order[:shared].sort().values, order[shared:].sort().values
    metrics: dict[str, object] = {"never_active": int((rate_I == 0).sum())}
    if shared:
        metrics["shared_activity"] = round(float(rate_I[always].sum() / rate_I.sum()), 4)
    if params["by"] == "cmoe":
        found = hot_clusters(marks_NI[:, rest], params["experts"], iterations=params["iterations"])
        metrics["distance"] = found.objective[-1]
    else:
        rng = work.rng("partition", work.layer)
        found = coactive_groups(
            marks_NI[:, rest], params["experts"], rng, iterations=params["iterations"]
        )
        # Of a random partition into E equal parts about 1 / E lies within.
        metrics |= {
            "within": [round(share, 4) for share in (found.objective[0], found.objective[-1])]
        }
    chosen = tuple(int(rest[place]) for place in found.representative_K)
    members: Any = rest.numpy()[found.members_KN]
    return Parts(always, members, metrics, representatives=chosen, neurons=neurons)


def _representatives(
    work: Work, neurons: activity.Neurons, members_EN: NDArray[np.int64]
) -> tuple[int, ...]:
    """The neuron of each expert whose marks are nearest to the members' mean, for parts made without activity."""
    from ...linalg.coactivation import representatives

    marks_NI = activity.active(neurons, "cmoe", work.params["active"])
    return representatives(marks_NI, members_EN)


def _strongest(rows: Sequence[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` neurons of largest norm product, and all others; both ascending, ties to the lower index."""
    import torch

    importance = torch.stack([matrix.double().norm(dim=1) for matrix in rows]).prod(dim=0)
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values
