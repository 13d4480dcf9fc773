"""Splitting: the neurons of every feed-forward are divided among experts, none copied and none lost.

A feed-forward is a sum over its I neurons, so any partition into E sets is F(x) = sum_e F_e(x) (MoEfication,
arXiv:2110.01786; LLaMA-MoE, arXiv:2406.16554). The mixture has the parameters of the dense model and, with k of E
experts per token, k / E of its feed-forward work.

* ``--by random``: a random balanced partition, the choice of LLaMA-MoE.
* ``--by kmeans``: balanced k-means on the rows of the gate projection, each scaled to length one: neurons that fire on
  similar inputs come together. Every assignment step is an exact linear assignment to clusters of I / E places.
* ``--by coactivation``: neurons that are active on the same tokens come together. Active are a token's ``--active``
  neurons (by default a tenth) of largest |act(g x) (u x)| |d|, the length of what a neuron adds to the output. The
  balanced partition with as many pairs active together within experts as can be found is a spectral one, improved by
  swaps of two neurons until none gains. (MoEfication and LLaMA-MoE cut the same graph with METIS, which is not
  balanced exactly, and weigh it by activations that ReLU or a threshold leaves.)
* ``--by cmoe``: CMoE (arXiv:2502.04416). Active are the ``--active`` (10) neurons of largest |act(g x) (u x)| with x,
  g and u of length one. Clusters begin with the E neurons that are active most often (of those that are not shared)
  and take the neurons whose marks over the tokens are nearest in L1, by an exact assignment; ``--iterations`` (1)
  goes on from means.

Routers: ``random`` rows N(0, std^2); ``centroid``, for k-means: row e is the mean of the cluster's normalised gate
rows, itself scaled to length one, so that a token goes where its cosine is largest (MoEfication's similarity router;
on normalised inputs its logits are of order one); ``uniform``: zero rows, only for k = E, where all experts are
always on. Two are fitted to the calibration text, by logistic regression of the k experts that are wanted
on what the router sees: ``analytic`` wants those of CMoE's router |act(g_r x) (u_r x)|, r being the neuron of each
expert whose marks are nearest to the mean of its expert's and rows having length one, which no stock class can hold;
``oracle`` wants the experts of largest |F_e(x)|. The report tells for every layer, on the quarter of the sampled
tokens that was not fitted, which share of the k experts of either the fitted router selects (recall@k), and of the
oracle's the analytic one. The default is centroid after k-means, random after random, analytic after cmoe and oracle
after co-activation.

The selected weights of a stock router sum to one, so each of k experts counts about 1 / k: down is multiplied by
``--scale``, by default k, so that selected neurons count as in the dense model. LLaMA-MoE also makes up for the E - k
parts that are missing and uses about E / k times as much or half of that. CMoE's selected experts all weigh exactly
1. ``--sharpness`` comes near to that on any router: it is the size of the logits (the root mean square of fitted ones
on the text; a factor on rows of other routers), and selections do not depend on it, but small logits weigh the
selected experts alike. It is 1/128 by default, which leaves weights equal to about one percent and is exact to store;
large ones are for training. With k = E, a uniform router and the default scale the output is the dense function.

``--router-init`` makes rows as in other methods, from texts for instance; their size is set by ``--temperature``.

``--shared-neurons S`` keeps S neurons always on, in the shared expert of a family that has one (its sigmoid gate is
1/2, its down doubled), and splits the rest. With coactivation and cmoe they are those that are active most often,
otherwise those of largest |gate row| |up row| |down column|, which bounds what a neuron adds to the output. CMoE's
own setting is 14 experts, k = 2 and an eighth of the neurons shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common
from . import _partition as partition
from . import _routers as routers

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...calibration.means import Means
    from ...execute import Work

INFO = MethodInfo(
    summary="divide the neurons of every feed-forward among experts: at random, by weights or by activations (CMoE)",
    paper="arXiv:2110.01786",
    inputs="one dense model",
    data="none",
)
BY_ACTIVITY = ("coactivation", "cmoe")
"""Ways to divide that need the neurons' activations."""
FITTED = ("analytic", "oracle")
"""Routers that need text."""
ROUTERS = {
    "kmeans": "centroid",
    "random": "random",
    "coactivation": "oracle",
    "cmoe": "analytic",
}
"""The router of each way to divide, by default."""
GIVEN = "given"
"""A router that a unit of its own makes, as in other methods."""
SHARPNESS = 2.0**-7
"""Logits of this size weigh selected experts alike to about one percent."""


@dataclass(frozen=True, kw_only=True)
class Options(common.RoutedOptions):
    """What the user chooses."""

    by: str = option(
        "kmeans",
        "what decides a neuron's expert; coactivation and cmoe need text",
        choices=("kmeans", "random", *BY_ACTIVITY),
    )
    router: str | None = option(
        None,
        "router rows; by default centroid for kmeans, random for random, oracle for coactivation, analytic for cmoe",
        choices=("centroid", "random", "uniform", *FITTED),
    )
    scale: float | None = option(None, "factor on the experts' outputs; by default top-k")
    sharpness: float = option(
        SHARPNESS, "size of the router's logits: small ones weigh selected experts alike"
    )
    shared_neurons: int = option(0, "neurons that are always on, in a shared expert")
    iterations: int | None = option(
        None, "most steps of clustering and of swaps; by default 20, for cmoe 1"
    )
    active: int | None = option(
        None, "neurons of a token that count as active; by default a tenth of all, for cmoe 10"
    )
    rows: int = option(4096, "tokens of the text whose activations decide")
    ridge: float = option(1e-2, "pull of a fitted router's rows towards zero")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with its neurons divided among experts.

    Raises:
        InputError: neurons that do not divide, or a parent that fits no target.
        UsageError: options out of range or in contradiction.
    """
    model = common.one_dense(models, "splitting")
    common.check_counts(options.experts, options.top_k, options.router_std)
    routers.check(options, options.experts, options.top_k)
    _check(options)
    router = _router(options)
    neurons = model.config.integer("intermediate_size")
    routed = neurons - options.shared_neurons
    if options.shared_neurons < 0 or routed < options.experts or routed % options.experts:
        kept = f" without {options.shared_neurons} shared ones" if options.shared_neurons else ""
        raise InputError(
            f"{model.folder}: {neurons} neurons{kept} do not divide into {options.experts} experts",
            hint="choose --experts or --shared-neurons so that experts have one width",
        )
    usual = 10 if options.by == "cmoe" else max(1, neurons // 10)
    active = min(usual, neurons) if options.active is None else options.active
    if not 1 <= active <= neurons:
        raise UsageError(f"--active {active}: a feed-forward has 1 to {neurons} neurons")
    mixture = common.grow(
        model,
        experts=options.experts,
        top_k=options.top_k,
        target=options.target,
        width=routed // options.experts,
        shared_width=options.shared_neurons or None,
    )
    scale = float(options.top_k) if options.scale is None else options.scale
    by_text = options.by in BY_ACTIVITY or router in FITTED
    steps = 1 if options.by == "cmoe" else 20
    params = {
        "part": "split",
        "by": options.by,
        "router": router,
        "std": options.router_std,
        "scale": scale,
        "sharpness": options.sharpness,
        "iterations": steps if options.iterations is None else options.iterations,
        "experts": options.experts,
        "top_k": options.top_k,
        "active": active,
        "ridge": options.ridge,
    }
    memory = partition.memory(
        neurons, routed, model.config.hidden, options.by, by_text * options.rows
    )

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
            writes=tuple(writes) if router == GIVEN else (experts.router, *writes),
            params=params,
            memory=memory,
        )
        own = [routers.unit(layer, experts, options)] if router == GIVEN else []
        return [unit, *own, *neutral], []

    draft = common.draft(mixture, fill, _exactness(mixture, options, router, scale))
    if by_text:
        draft = replace(draft, data="means", sample=options.rows)
    return routers.asking(draft, options, options.experts)


def decide(model: Model, options: Options, statistics: Means, seed: int) -> dict[str, Any]:
    """How many tokens each layer's neurons are judged by, and what a router from texts would select.

    Raises:
        InputError: too few tokens to tell neurons apart.
    """
    found: dict[str, Any] = {}
    for layer in model.layers:
        rows = statistics.sampled(layer.index)
        if rows < 2 * options.experts:
            raise InputError(
                f"the text gives {rows} tokens to divide neurons among {options.experts} experts by",
                hint="ask for more --tokens and --rows",
            )
        found[str(layer.index)] = {"rows": rows}
    if options.router_init in routers.DATA:
        for index, entry in routers.decide(model, options, statistics, seed).items():
            found[index] |= entry
    return found


def transform(work: Work) -> dict[str, object]:
    """Divide the neurons of one layer, or fill a neutral shared expert."""
    import torch

    done = common.fill_common(work)
    if done is not None:
        return done
    params, writes = work.params, work.unit.writes
    count, own = params["experts"], params["router"] != GIVEN
    rows = [work.read(region) for region in work.unit.reads]
    rows[2] = rows[2].T
    routed, shared = writes[own : own + 3 * count], writes[own + 3 * count :]
    parts = partition.divide(work, rows, shared[0].shape[0] if shared else 0)
    for expert in range(count):
        chosen = torch.from_numpy(parts.members_EN[expert])
        for role, region in enumerate(routed[3 * expert : 3 * expert + 3]):
            _put(work, region, rows[role].index_select(0, chosen), role, params["scale"])
    for role, region in enumerate(shared[:3]):
        kept = rows[role].index_select(0, parts.always)
        _put(work, region, kept, role, 2.0 if shared[3:] else 1.0)
    for region in shared[3:]:
        work.write(region, torch.zeros(region.shape))
    if not own:
        return parts.metrics
    rows_ED, metrics = partition.router(work, rows, parts, writes[0].shape)
    work.write(writes[0], rows_ED)
    return parts.metrics | metrics


def _check(options: Options) -> None:
    if options.iterations is not None and options.iterations < 1:
        raise UsageError("--iterations should be at least 1")
    if options.scale is not None and not options.scale > 0:
        raise UsageError("--scale should be above 0")
    if options.rows < 1:
        raise UsageError(f"--rows should be at least 1, is {options.rows}")
    for name, value in (("sharpness", options.sharpness), ("ridge", options.ridge)):
        if not 0 < value < float("inf"):
            raise UsageError(f"--{name} should be above 0, is {value}")


def _router(options: Options) -> str:
    if options.router_init != "normal":
        if options.router is not None:
            raise UsageError(
                "--router and --router-init exclude each other", hint="give one of them"
            )
        return "uniform" if options.router_init == "zero" else GIVEN
    router = options.router or ROUTERS[options.by]
    if router == "centroid" and options.by != "kmeans":
        raise UsageError(
            f"--router centroid needs --by kmeans: parts by {options.by} have no centroids of rows"
        )
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
    # A router that is fitted where all experts are wanted is zero.
    even = router in ("uniform", *FITTED) and mixture.rule.weights_sum_to_one
    if not even or scale != options.experts:
        return Exactness("approximate", "the parts are not weighted equally, or not by one")
    if options.experts & (options.experts - 1) and not types <= {"F32", "F64"}:
        rounded = ", ".join(sorted(types))
        return Exactness(
            "approximate", f"{options.experts} times the down projection rounds in {rounded}"
        )
    return Exactness("exact", "all parts are on, each with weight one")


def _put(work: Work, region: Any, neurons: torch.Tensor, role: int, scale: float) -> None:
    work.write(region, neurons if role < 2 else neurons.T * scale)
