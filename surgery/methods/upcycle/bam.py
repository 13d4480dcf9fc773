"""Branch-Attend-Mix: attentions and feed-forwards of several models of one shape become experts.

Branch-Attend-Mix (BAM, arXiv:2408.08274). Attention experts are mixed softly by a router over all N of them, for every
token; feed-forward experts are selected, one for each token, by another router; everything else is the plain mean.

    MoA(u) = sum_j g_j(u) Attention_j(u)    g = softmax(W_a u)
    MoE(u) = sum_{i in top-k} p_i(u) FFN_i(u)    p = softmax(W_f u)

MoA is computed as one attention with N times the heads, whose heads' outputs are multiplied by their expert's gate:

    W_q = [W_q^1; ...; W_q^N]    W_k, W_v likewise    W_o = [W_o^1 | ... | W_o^N]

and query head i still reads key-value head i // (h / h_kv). The output needs the model code that it brings, whose
attention is the stock class's own (masks, cache, kernels, generation). ``--kv shared`` is the paper's Shared-KV
variant: one key and value projection, the mean of the models', query heads model by model below each key-value head,
and a key-value cache of the dense model's size. Blocks are sequential or parallel as the parents' are; the paper's are
parallel (Cohere 2). Head norms (Qwen3) and output biases are each expert's own.

``p`` is not normalised over the selected experts, as published, so feed-forwards start scaled by p; ``--norm-topk``
normalises them, and then N times the same model gives that model's function, whatever the routers.

``--fold-gates`` writes constant gates ``--gates`` (equal by default) into W_o = [g_1 W_o^1 | ... | g_N W_o^N], which
is a stock mixture with N times the heads and the family's own router. In 16-bit types folded gates round unless
they are powers of two.

``--target jetmoe`` (with ``--kv shared``) is a stock class for parents whose blocks fit it: Llama's without biases
and window. It mixes all feed-forwards softly too, and weights always sum to one.

Deviations: the paper gives neither the routers' distribution nor the shared keys' and values' origin; they are
N(0, std^2) and the mean, its rule for all that is not an expert. The seed is an expert where it is given as a source.
``--router-init`` starts the feed-forwards' router otherwise, for instance from a text for each model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...modeling import custom_config, files
from ...plan import Unit
from .._numbers import parse_numbers
from ..base import Draft, Exactness, MethodInfo, option
from . import _attentions as attentions
from . import _branches as branches
from . import _common as common
from . import _jetmoe as jetmoe
from . import _routers as routers
from ._routers import RouterOptions

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="attentions of several models mixed by a router, feed-forwards as experts",
    paper="arXiv:2408.08274",
    inputs="two or more dense models",
    data="none",
    tier="custom",
)
KEY = "moesurg_bam"
ROUTER = "expert_router"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(RouterOptions):
    """What the user chooses."""

    kv: str = option(
        "expert",
        "keys and values: every expert's own, or one averaged projection for all",
        choices=("expert", "shared"),
    )
    top_k: int | None = option(
        None, "feed-forward experts each token selects; by default 1, and 2 with --fold-gates"
    )
    norm_topk: bool = option(False, "make the selected feed-forwards' weights sum to one")
    fold_gates: bool = option(
        False, "constant gates, folded into the output projection: loads in stock classes"
    )
    gates: str | None = option(
        None,
        "weights of the attentions under --fold-gates, such as 0.5,0.25,0.25; equal by default",
        metavar="G,...",
    )
    target: str | None = option(
        None,
        "MoE family to write; by default the one that fits the parents. jetmoe holds attention experts without model "
        "code, with --kv shared",
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The models' blocks with attention experts and one feed-forward expert from every model.

    Raises:
        InputError: fewer than two models, models that differ in more than their weights, or whose norms on query
            and key cannot be each expert's own.
        UsageError: counts or gates out of range, or options that --target jetmoe does not have.
    """
    first, count = models[0], len(models)
    notes = branches.check(models)
    if options.target == jetmoe.NAME:
        if options.fold_gates:
            raise UsageError("--target jetmoe has a router over attentions; leave out --fold-gates")
        return jetmoe.plan(models, options, kv=options.kv, top_k=options.top_k, notes=notes)
    if options.gates is not None and not options.fold_gates:
        raise UsageError("--gates are constants, which only --fold-gates writes")
    gates = _gates(options.gates, count) if options.fold_gates else None
    top_k = options.top_k if options.top_k is not None else 2 if options.fold_gates else 1
    common.check_counts(count, top_k, options.router_std)
    routers.check(options, count, top_k)
    attention = attentions.Attentions(first, count, options.kv == "shared", gates)
    attention.check()
    mixture = common.grow(
        first, experts=count, top_k=top_k, target=options.target, changes=attention.config()
    )
    if not options.fold_gates:
        mixture = _with_stock_names(mixture)
        if options.norm_topk and not mixture.rule.weights_sum_to_one:
            raise InputError(
                f"{mixture.family.model_type} does not make the selected weights sum to one",
                hint="leave out --norm-topk",
            )
    if top_k == 1 and (options.fold_gates or options.norm_topk) and mixture.rule.weights_sum_to_one:
        notes.append(
            "one selected weight that is made to sum to one is one, so the feed-forwards' router has no gradient from "
            "it; use --top-k 2 to train the router"
        )
    shapes = attention.shapes()

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units = [
            routers.unit(layer, experts, options),
            *common.neutral_units(mixture, layer),
        ]
        if not options.fold_gates:
            units.append(_router(first, layer, count, options.router_std))
        return units, branches.experts(models, layer, experts)

    def keep(name: str, layer: int | None) -> list[Unit]:
        return attention.keep(name, layer, shapes.get(name))

    exactness = _exactness(mixture, models, options, top_k, gates)
    draft = common.draft(mixture, fill, exactness, keep=keep, shapes=shapes, notes=notes)
    draft = routers.asking(draft, options, count)
    return draft if options.fold_gates else _custom(draft, mixture, attention, options)


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Draw a router's rows, fill a neutral shared expert, average a block, or join output projections."""
    import torch

    part = work.params["part"]
    if part == "mean":
        return branches.mean(work)
    if part == "join":
        return attentions.join(work)
    if part == "repeat":
        return jetmoe.fill(work)
    if part == "attention-router":
        (target,) = work.unit.writes
        rows = work.rng("attention-router", work.layer).standard_normal(
            target.shape, dtype="float32"
        )
        work.write(target, torch.from_numpy(rows) * work.params["std"])
        return {}
    return common.fill_common(work) or {}


def _with_stock_names(mixture: common.Mixture) -> common.Mixture:
    """The planned experts under the names of the stock modules, which custom outputs have."""
    stock = mixture.moe.stock
    if stock.call != "routed":
        raise InputError(
            f"blocks of {mixture.family.model_type} do not call their experts by index",
            hint="use --fold-gates",
        )
    experts = {
        index: dataclasses.replace(found, layout=stock) for index, found in mixture.experts.items()
    }
    return dataclasses.replace(mixture, experts=experts)


def _custom(
    draft: Draft, mixture: common.Mixture, attention: attentions.Attentions, options: Options
) -> Draft:
    """The draft with routers over attention experts, and the config and files of the model code."""
    model = mixture.model
    raw = dict(mixture.raw)
    if not options.norm_topk and "norm_topk_prob" in raw:
        raw["norm_topk_prob"] = False
    config = custom_config(mixture.family, raw)
    config[KEY] = {
        "experts": attention.count,
        "blocks": attention.blocks,
        "norms": [name.split(".")[1] for name in attention.norms],
        "router": mixture.moe.stock.modules[0],
        "plain": not options.norm_topk,
    }
    routers = [
        attentions.router_spec(model, layer, ROUTER, attention.count) for layer in model.layers
    ]
    return dataclasses.replace(
        draft, config=config, tensors=[*draft.tensors, *routers], tier="custom", files=files()
    )


def _router(model: Model, layer: Layer, count: int, std: float) -> Unit:
    spec = attentions.router_spec(model, layer, ROUTER, count)
    target = Region(spec.name, spec.shape)
    return Unit(
        f"layer.{layer.index}.attention_router",
        "transform",
        layer.index,
        writes=(target,),
        params={"part": "attention-router", "std": std},
        memory=16 * target.count,
    )


def _gates(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    gates = parse_numbers("--gates", text, count, "models")
    if not all(0 <= gate <= 1 for gate in gates) or not math.isclose(sum(gates), 1, abs_tol=1e-6):
        raise UsageError(f"--gates {text} should be between 0 and 1 with sum 1")
    return gates


def _exactness(
    mixture: common.Mixture,
    models: Sequence[Model],
    options: Options,
    top_k: int,
    gates: Sequence[float] | None,
) -> Exactness:
    if not branches.identical(models):
        return Exactness("approximate", "attentions and experts of different files are mixed")
    if gates is None:
        if options.norm_topk or top_k == len(models):
            reason = (
                "identical attentions under gates that sum to one, and identical experts likewise"
            )
            return Exactness("exact", reason)
        return Exactness(
            "approximate",
            "the selected feed-forwards' weights are not made to sum to one, so outputs shrink by their sum",
        )
    name = mixture.model.layers[0].prefix + attentions.OUTPUT
    rounded = mixture.model.dtype(name)
    if rounded not in {"F32", "F64"} and any(math.frexp(gate)[0] not in (0, 0.5) for gate in gates):
        return Exactness("approximate", f"gates that are no powers of two round in {rounded}")
    return common.identical_experts(mixture)
