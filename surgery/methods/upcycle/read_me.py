"""Read-ME: a mask of neurons for each domain of text, and one router for all layers that sees tokens before they run.

Read-ME (arXiv:2410.19123). ``--data FILE`` is given once for every expert, in order. In every layer a neuron's
importance to domain d is the mean of |its value| (what the down projection is given) over the tokens of text d; the
mask of d keeps the ``--fraction`` of neurons (half) that is largest, ties to the lower index. The residual is what all
masks keep. With ``--residual shared`` (default) it is stored once, and expert d holds the rest of its mask;
``--residual fused`` gives every expert its whole mask. Both are the same function: the dense feed-forward with all
other neurons left out. Attention, norms, embeddings and head stay as they are.

The router is one for the whole model and knows token ids alone, so that all experts of a token are known before its
first layer runs, and every token selects one expert with weight one. It is stored as evidence [V, C] of every token of
the vocabulary for every expert, which add up over the tokens so far, older ones decayed by half over ``--half-life``.

Untrained. The paper's router, a small transformer with embeddings of its own, is trained in turns with the experts.
Nothing is trained here, so the router is what has a closed form: with e the model's input embeddings and p_t the
decayed mean of e over the tokens up to t, multinomial logistic regression of the text on p_t (L2, float64, on
``--router-sample`` tokens of each text) gives rows V, and because p_t is linear in e, evidence of token x is V e(x).
Half-lives of 0, 1, 2, 4, ... 128 tokens are tried on every fifth sequence, which the fit leaves out, and the best is
taken, the shorter among equals; a given one is a power of two. The report has these accuracies, ``accuracy`` on the
rows of the fit, and the shares of tokens that each expert gets.

Deviations: masks keep exactly the asked number of neurons, where the published code's strict comparison loses one. The
paper goes on from masks by training; here they are the whole method, so expect quality to fall with the fraction. A
layer's width is that of its mask, whatever kernels prefer.

The output brings model code. With ``--fraction 1`` all masks are full and it is the dense function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...modeling import custom_config, files
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, MethodInfo, option, required
from . import _common as common
from . import _pre_router as pre_router

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Layer, Model
    from ...calibration.means import Means
    from ...execute import Work

INFO = MethodInfo(
    summary="masks of neurons by domain of text, chosen before the layers by one untrained router",
    paper="arXiv:2410.19123",
    inputs="one dense model",
    data="neurons",
    tier="custom",
)
KEY = "moesurg_read_me"
ROUTER = "pre_router"
FFN = "mlp"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    experts: int = required("experts, one for each --data")
    fraction: float = option(0.5, "share of a feed-forward's neurons that a domain's mask keeps")
    residual: str = option(
        "shared",
        "neurons that all masks keep: stored once, or in every expert",
        choices=("shared", "fused"),
    )
    half_life: int | None = option(
        None, "tokens after which evidence counts half, a power of two or 0; chosen by default"
    )
    router_l2: float = option(0.01, "penalty on the rows of the router's logistic regression")
    router_sample: int = option(1024, "tokens of each text that the router is fitted to")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with domains' parts in the place of every feed-forward.

    What the masks share is not known yet, so that a first plan gives every expert its whole mask.

    Raises:
        InputError: not one dense model, or one whose feed-forwards have biases or are not gated.
        UsageError: options out of range.
    """
    return _plan(models, options, {})


def settle(models: Sequence[Model], options: Options, decisions: Mapping[str, Any]) -> Draft | None:
    """Plan again with the numbers of neurons that all masks share."""
    if options.residual == "fused":
        return None
    return _plan(models, options, {int(k): found["shared"] for k, found in decisions.items()})


def decide(model: Model, options: Options, statistics: Means, seed: int) -> dict[str, Any]:
    """By layer: neurons of a mask, of all masks together, of any mask, and the mean overlap of two (Jaccard)."""
    found: dict[str, Any] = {}
    for layer in model.layers:
        mask_CF = _masks(statistics.neurons(layer.index), _width(layer, options))
        both_CC = (mask_CF.double() @ mask_CF.double().T) if len(mask_CF) > 1 else None
        width = int(mask_CF[0].sum())
        entry: dict[str, object] = {
            "texts": statistics.domains,
            "width": width,
            "shared": int(mask_CF.all(dim=0).sum()),
            "any": int(mask_CF.any(dim=0).sum()),
        }
        if both_CC is not None:
            pairs = both_CC[~_diagonal(len(mask_CF))]
            entry["overlap"] = round(float((pairs / (2 * width - pairs)).mean()), 4)
        found[str(layer.index)] = entry
    return found


def transform(work: Work) -> dict[str, object]:
    """Fit the router, or cut one matrix of a layer into the shared part and the experts' own."""
    import torch

    from ...calibration.means import Means

    params = work.params
    statistics = Means.open(work.statistics)
    if params["part"] == "router":
        return pre_router.fill(work, statistics)
    mask_CF = _masks(statistics.neurons(work.layer), params["width"])
    common_F = mask_CF.all(dim=0) & params["shared"]
    axis = 1 if params["projection"] == "down" else 0
    matrix = work.read(work.unit.reads[0])
    for region in work.unit.writes:
        if len(region.shape) == 2:
            place_N = torch.nonzero(common_F).flatten()
            work.write(region, matrix.index_select(axis, place_N))
            continue
        own = [
            matrix.index_select(axis, torch.nonzero(mask_F & ~common_F).flatten())
            for mask_F in mask_CF
        ]
        work.write(region, torch.stack(own))
    return {}


def _plan(models: Sequence[Model], options: Options, shared: Mapping[int, int]) -> Draft:
    model = common.one_dense(models, "Read-ME")
    _check(model, options)
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    owners = {name: layer for layer in model.layers for name in layer.names}
    roles = {
        region.tensor: (layer, role) for layer in model.layers for role, region in layer.ffn.items()
    }
    passing: dict[int | None, list[Region]] = {}
    for name in model.names():
        if name in roles:
            layer, role = roles[name]
            made = _matrix(model, layer, role, options, shared.get(layer.index, 0))
            tensors.extend(
                TensorSpec(region.tensor, model.dtype(name), region.shape) for region in made.writes
            )
            units.append(made)
            continue
        owner = owners.get(name)
        tensors.append(TensorSpec(name, model.dtype(name), model.checkpoint.tensors[name].shape))
        passing.setdefault(owner.index if owner else None, []).append(model.whole(name))
    for index, regions in passing.items():
        label = "outer" if index is None else f"layer.{index}"
        moves = [(region, [region]) for region in regions]
        units.append(copy_unit(f"{label}.copies", moves, layer=index))
    body = model.family.embedding.partition(".")[0]
    router, specs = pre_router.unit(
        model,
        f"{body}.{ROUTER}",
        options.experts,
        half_life=options.half_life,
        l2=options.router_l2,
        sample=options.router_sample,
    )
    tensors.extend(specs)
    units.append(router)
    units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    config = custom_config(model.family, model.config.raw)
    config[KEY] = {
        "experts": options.experts,
        "width": _width(model.layers[0], options),
        "shared": [shared.get(layer.index, 0) for layer in model.layers],
    }
    exactness = Exactness("approximate", f"{options.fraction:.0%} of the neurons work for a token")
    if _width(model.layers[0], options) == model.layers[0].ffn["gate"].shape[0]:
        exactness = Exactness("exact", "every mask holds all neurons")
    return Draft(
        config,
        tensors,
        units,
        exactness,
        tier="custom",
        notes=[
            "untrained: masks are statistics of the texts and the router is fitted in closed form, where the paper "
            "trains both"
        ],
        files=files(),
        sample=options.router_sample * options.experts,
        texts=options.experts,
    )


def _check(model: Model, options: Options) -> None:
    if options.experts < 1:
        raise UsageError(f"--experts should be at least 1, is {options.experts}")
    if not 0 < options.fraction <= 1:
        raise UsageError(f"--fraction should be above 0 and at most 1, is {options.fraction}")
    pre_router.check(options.half_life, options.router_l2, options.router_sample)
    for layer in model.layers:
        if set(layer.ffn) != set(PROJECTIONS) or model.family.dense_biases(model.config):
            raise InputError(
                f"{model.folder}: layer {layer.index}: its feed-forward is not gate, up and down without biases"
            )
        for role, region in layer.ffn.items():
            if region.tensor != f"{layer.prefix}{FFN}.{role}_proj.weight":
                raise InputError(
                    f"{model.folder}: {region.tensor} is not where the model code looks for it",
                    hint=f"it takes feed-forwards called {FFN} with matrices of their own",
                )
    if len({layer.ffn["gate"].shape for layer in model.layers}) > 1:
        raise InputError(f"{model.folder}: feed-forwards of several widths")


def _width(layer: Layer, options: Options) -> int:
    """Neurons of a mask."""
    return max(1, round(options.fraction * layer.ffn["gate"].shape[0]))


def _matrix(model: Model, layer: Layer, role: str, options: Options, shared: int) -> Unit:
    """The unit that cuts one matrix; it writes the shared part and the experts', where there are such."""
    source = layer.ffn[role]
    hidden = source.shape[0 if role == "down" else 1]
    width = _width(layer, options)
    own, place = width - shared, f"{layer.prefix}{FFN}"
    writes = []
    if shared:
        shape = (hidden, shared) if role == "down" else (shared, hidden)
        writes.append(Region(f"{place}.shared.{role}_proj.weight", shape))
    if own:
        shape = (hidden, own) if role == "down" else (own, hidden)
        writes.append(Region(f"{place}.experts.{role}", (options.experts, *shape)))
    return Unit(
        f"layer.{layer.index}.{role}",
        "transform",
        layer.index,
        reads=(source,),
        writes=tuple(writes),
        params={
            "part": "masks",
            "projection": role,
            "width": width,
            "shared": options.residual == "shared",
        },
        # The matrix, its parts and their stack, and importances in float64.
        memory=4 * source.count + 8 * hidden * (shared + options.experts * own) + 64 * width,
    )


def _masks(importance_CF: torch.Tensor, width: int) -> torch.Tensor:
    """Which neurons each domain keeps: bool [C, F], ``width`` true in each row, ties to the lower index."""
    import torch

    order_CF = torch.argsort(importance_CF, dim=1, descending=True, stable=True)
    mask_CF = torch.zeros(importance_CF.shape, dtype=torch.bool)
    return mask_CF.scatter_(1, order_CF[:, :width], True)


def _diagonal(count: int) -> torch.Tensor:
    import torch

    return torch.eye(count, dtype=torch.bool)
