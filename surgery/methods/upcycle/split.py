"""Splitting: the neurons of every feed-forward are divided among experts, none copied and none lost.

A feed-forward is a sum over its I neurons, so any partition into E sets is F(x) = sum_e F_e(x) (MoEfication,
arXiv:2110.01786; LLaMA-MoE, arXiv:2406.16554). The mixture has the parameters of the dense model and, with k of E
experts per token, k / E of its feed-forward work.

* ``--by random``: a random balanced partition, the choice of LLaMA-MoE.
* ``--by kmeans``: balanced k-means on the rows of the gate projection, each scaled to length one: neurons that fire on
  similar inputs come together. Every assignment step is an exact linear assignment to clusters of I / E places.

Routers: ``random`` rows N(0, std^2); ``centroid``, for k-means: row e is the mean of the cluster's normalised gate
rows, itself scaled to length one, so that a token goes where its cosine is largest (MoEfication's similarity router;
on normalised inputs its logits are of order one); ``uniform``: zero rows, only for k = E, where all experts are
always on. The default is centroid after k-means and random otherwise.

The selected weights of a stock router sum to one, so each of k experts counts about 1 / k: down is multiplied by
``--scale``, by default k, so that selected neurons count as in the dense model. LLaMA-MoE also makes up for the E - k
parts that are missing and uses about E / k times as much or half of that. With k = E, a uniform router and the default
scale the output is the dense function.

``--shared-neurons S`` keeps S neurons always on, in the shared expert of a family that has one (its sigmoid gate is
1/2, its down doubled), and splits the rest. They are those of largest |gate row| |up row| |down column|, which bounds
what a neuron adds to the output; CMoE counts activations instead.

Left out, because they need activations of a dense model: clustering by activation rate or co-activation, and routers
fitted to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="divide the neurons of every feed-forward among experts, at random or by balanced k-means",
    paper="arXiv:2110.01786",
    inputs="one dense model",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.GrowOptions):
    """What the user chooses."""

    by: str = option("kmeans", "what decides a neuron's expert", choices=("kmeans", "random"))
    router: str | None = option(
        None,
        "router rows; by default centroid for kmeans and random for random",
        choices=("centroid", "random", "uniform"),
    )
    scale: float | None = option(None, "factor on the experts' outputs; by default top-k")
    shared_neurons: int = option(0, "neurons that are always on, in a shared expert")
    iterations: int = option(20, "most steps of k-means")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with its neurons divided among experts.

    Raises:
        InputError: neurons that do not divide, or a parent that fits no target.
        UsageError: options out of range or in contradiction.
    """
    model = common.one_dense(models, "splitting")
    common.check_counts(options.experts, options.top_k, options.router_std)
    router = _router(options)
    neurons = model.config.integer("intermediate_size")
    routed = neurons - options.shared_neurons
    if options.shared_neurons < 0 or routed < options.experts or routed % options.experts:
        kept = f" without {options.shared_neurons} shared ones" if options.shared_neurons else ""
        raise InputError(
            f"{model.folder}: {neurons} neurons{kept} do not divide into {options.experts} experts",
            hint="choose --experts or --shared-neurons so that experts have one width",
        )
    mixture = common.grow(
        model,
        experts=options.experts,
        top_k=options.top_k,
        target=options.target,
        width=routed // options.experts,
        shared_width=options.shared_neurons or None,
    )
    scale = float(options.top_k) if options.scale is None else options.scale
    params = {
        "part": "split",
        "by": options.by,
        "router": router,
        "std": options.router_std,
        "scale": scale,
        "iterations": options.iterations,
        "experts": options.experts,
    }

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        writes = [experts.region(e, p) for e in range(experts.count) for p in PROJECTIONS]
        neutral: list[Unit] = []
        if options.shared_neurons:
            writes.extend(mixture.shared(layer).values())
        else:
            neutral = common.neutral_units(mixture, layer)
        unit = Unit(
            f"layer.{layer.index}.split",
            "transform",
            layer.index,
            reads=tuple(layer.ffn[projection] for projection in PROJECTIONS),
            writes=(experts.router, *writes),
            params=params,
            memory=_memory(neurons, routed, experts.hidden, options),
        )
        return [unit, *neutral], []

    return common.draft(mixture, fill, _exactness(mixture, options, router, scale))


def transform(work: Work) -> dict[str, object]:
    """Divide the neurons of one layer, or fill a neutral shared expert."""
    import numpy as np
    import torch

    done = common.fill_common(work)
    if done is not None:
        return done
    params, writes = work.params, work.unit.writes
    count = params["experts"]
    rows = [work.read(region) for region in work.unit.reads]
    rows[2] = rows[2].T
    routed, shared = writes[1 : 1 + 3 * count], writes[1 + 3 * count :]
    always, rest = _always_on(rows, shared[0].shape[0] if shared else 0)
    members, centres, metrics = _partition(work, rows[0], rest)
    for expert in range(count):
        chosen = torch.from_numpy(members[expert])
        for role, region in enumerate(routed[3 * expert : 3 * expert + 3]):
            _put(work, region, rows[role].index_select(0, chosen), role, params["scale"])
    for role, region in enumerate(shared[:3]):
        _put(work, region, rows[role].index_select(0, always), role, 2.0 if shared[3:] else 1.0)
    for region in shared[3:]:
        work.write(region, torch.zeros(region.shape))
    router = torch.zeros(writes[0].shape)
    if params["router"] == "random":
        draw = work.rng("router", work.layer).standard_normal(router.shape, dtype="float32")
        router = torch.from_numpy(draw) * params["std"]
    elif centres is not None and params["router"] == "centroid":
        lengths = np.linalg.norm(centres, axis=1, keepdims=True)
        router = torch.from_numpy(centres / np.maximum(lengths, 1e-12))
    work.write(writes[0], router)
    return metrics


def _router(options: Options) -> str:
    if options.iterations < 1:
        raise UsageError("--iterations should be at least 1")
    if options.scale is not None and not options.scale > 0:
        raise UsageError("--scale should be above 0")
    router = options.router or ("centroid" if options.by == "kmeans" else "random")
    if router == "centroid" and options.by == "random":
        raise UsageError("--router centroid needs --by kmeans: random parts have no centroids")
    if router == "uniform" and options.top_k != options.experts:
        raise InputError(
            "--router uniform would send all tokens to the same experts",
            hint="it is for --top-k equal to --experts, where all are on",
        )
    return router


def _exactness(mixture: common.Mixture, options: Options, router: str, scale: float) -> Exactness:
    if options.top_k < options.experts:
        return Exactness(
            "approximate", f"{options.top_k} of {options.experts} parts are on for a token"
        )
    types = {mixture.model.dtype(layer.ffn["down"].tensor) for layer in mixture.model.layers}
    if router != "uniform" or scale != options.experts or not mixture.rule.weights_sum_to_one:
        return Exactness("approximate", "the parts are not weighted equally, or not by one")
    if options.experts & (options.experts - 1) and not types <= {"F32", "F64"}:
        rounded = ", ".join(sorted(types))
        return Exactness(
            "approximate", f"{options.experts} times the down projection rounds in {rounded}"
        )
    return Exactness("exact", "all parts are on, each with weight one")


def _memory(neurons: int, routed: int, hidden: int, options: Options) -> int:
    """Matrices as float32, and for k-means points, distances and the assignment's cost in float64."""
    matrices = 4 * 5 * neurons * hidden
    return matrices + (8 * (3 * routed * hidden + 2 * routed**2) if options.by == "kmeans" else 0)


def _always_on(rows: Sequence[torch.Tensor], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` neurons of largest norm product, and all others; both ascending, ties to the lower index."""
    import torch

    importance = torch.stack([matrix.double().norm(dim=1) for matrix in rows]).prod(dim=0)
    order = torch.argsort(importance, descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values


def _partition(
    work: Work, gate_FD: torch.Tensor, rest: torch.Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None, dict[str, object]]:
    """Neurons of each expert, ascending; centroids and their fit for k-means."""
    import numpy as np

    from ...linalg.balanced import balanced_kmeans

    count, places = work.params["experts"], len(rest) // work.params["experts"]
    rng = work.rng("partition", work.layer)
    if work.params["by"] == "random":
        order = rest.numpy()[rng.permutation(len(rest))].reshape(count, places)
        return np.sort(order, axis=1), None, {}
    points = gate_FD.index_select(0, rest).double().numpy()
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    found = balanced_kmeans(points, count, rng, iterations=work.params["iterations"])
    total = float(np.square(points - points.mean(axis=0)).sum())
    metrics: dict[str, object] = {
        "kmeans_steps": len(found.inertia),
        # 1 for a partition that explains nothing, 0 for equal rows within every cluster.
        "variance_left": found.inertia[-1] / total if total else 0.0,
    }
    return rest.numpy()[found.members_KN], found.centres_KD, metrics


def _put(work: Work, region: Any, neurons: torch.Tensor, role: int, scale: float) -> None:
    work.write(region, neurons if role < 2 else neurons.T * scale)
