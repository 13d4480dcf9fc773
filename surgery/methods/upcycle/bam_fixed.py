"""BAM with fixed gates: attention of all models side by side, feed-forwards as experts, in a stock class.

Branch-Attend-Mix (BAM, arXiv:2408.08274) makes experts of attention too, mixed softly by a router over all N of them:
MoA(u) = sum_j g_j(u) Attention_j(u). No stock class has such a router. With gates that are constants the mixture is one
ordinary attention with N times the heads, because a gate then folds into the output projection:

    W_q = [W_q^1; ...; W_q^N]    W_k, W_v likewise    W_o = [g_1 W_o^1 | ... | g_N W_o^N]

and query head i still reads key-value head i // (h / h_kv), since both are stacked in the models' order. So this is
the BTX mixture (router over feed-forward experts, norms and embeddings averaged) whose attention is the weighted sum of
the models' attentions instead of the attention of averaged weights. ``--gates`` are N numbers with sum one; equal by
default.

``--share-kv`` is BAM's Shared-KV variant: one key and value projection, the mean of the models', and query heads in the
order that keeps each beside its key-value head; the key-value cache keeps its size.

N times the same model gives that model's function. In 16-bit types the folded gates round unless they are powers of
two. Refused are families with norms on query and key (Qwen3, one norm for all heads).

Deviations from BAM: constant gates instead of a router over attention experts; the target's normalised top-k over
feed-forward experts instead of top-1 without normalisation; the parents' sequential block instead of a parallel one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _branches as branches
from . import _common as common

if TYPE_CHECKING:
    from ...architectures.base import Shape
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="attentions of several models side by side under fixed gates, feed-forwards as experts",
    paper="arXiv:2408.08274",
    inputs="two or more dense models",
    data="none",
)

OUTPUT = "self_attn.o_proj.weight"
QUERY = ("self_attn.q_proj.weight", "self_attn.q_proj.bias")
KEY_VALUE = tuple(f"self_attn.{side}_proj.{kind}" for side in "kv" for kind in ("weight", "bias"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    top_k: int = option(2, "feed-forward experts each token selects")
    target: str | None = option(
        None, "MoE family to write; by default the one that fits the parents"
    )
    router_std: float = option(0.02, "standard deviation of the router's random rows")
    gates: str | None = option(
        None, "weights of the attentions, such as 0.5,0.25,0.25; equal by default", metavar="G,..."
    )
    share_kv: bool = option(False, "one averaged key and value projection for all attentions")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The models' blocks with attention side by side and one expert from every model.

    Raises:
        InputError: fewer than two models, models that differ in more than their weights, or that have norms on
            query and key.
        UsageError: counts or gates out of range.
    """
    first, count = models[0], len(models)
    notes = branches.check(models)
    gates = _gates(options.gates, count)
    common.check_counts(count, options.top_k, options.router_std)
    for layer in first.layers:
        if any(name.endswith("q_norm.weight") for name in layer.names):
            raise InputError(
                f"{first.folder}: {first.family.model_type} has norms on query and key, one for all heads, "
                "and each model's heads would need their own",
                hint="--method btx averages them",
            )
    config = first.config
    heads = {"num_attention_heads": count * config.heads, "head_dim": config.head_dim}
    heads["num_key_value_heads"] = config.kv_heads * (1 if options.share_kv else count)
    mixture = common.grow(
        first, experts=count, top_k=options.top_k, target=options.target, changes=heads
    )
    shapes = _shapes(first, count, options.share_kv)

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        router = common.router_unit(layer, experts, options.router_std)
        return [router, *common.neutral_units(mixture, layer)], branches.experts(
            models, layer, experts
        )

    def keep(name: str, layer: int | None) -> list[Unit]:
        if name not in shapes:
            return branches.averages(first.whole(name), count, layer)
        if name.endswith(OUTPUT):
            return [_output(first, name, shapes[name], layer, gates, options.share_kv)]
        return [
            copy_unit(f"stack.{name}", _stacked(first, name, count, options.share_kv), layer=layer)
        ]

    exactness = _exactness(mixture, models, gates)
    return common.draft(mixture, fill, exactness, keep=keep, shapes=shapes, notes=notes)


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, fill a neutral shared expert, average a block, or fold gates into an output projection."""
    import torch

    done = common.fill_common(work)
    if done is not None:
        return done
    if work.params["part"] == "mean":
        return branches.mean(work)
    (target,) = work.unit.writes
    parts = [
        gate * work.read(region)
        for gate, region in zip(work.params["gates"], work.unit.reads, strict=True)
    ]
    # Columns of the heads that share a key-value head, which are all of a model's where none is shared.
    groups = work.params["groups"]
    split = torch.stack([part.reshape(part.shape[0], groups, -1) for part in parts], dim=2)
    work.write(target, split.reshape(target.shape))
    return {}


def _gates(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        gates = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--gates {text!r} should be numbers with commas between") from None
    if len(gates) != count:
        raise UsageError(f"--gates names {len(gates)} numbers for {count} models")
    if not all(0 <= gate <= 1 for gate in gates) or not math.isclose(sum(gates), 1, abs_tol=1e-6):
        raise UsageError(f"--gates {text} should be between 0 and 1 with sum 1")
    return gates


def _shapes(model: Model, count: int, share_kv: bool) -> dict[str, Shape]:
    """Shapes of the attention tensors that grow."""
    grown = QUERY if share_kv else (*QUERY, *KEY_VALUE)
    found: dict[str, Shape] = {}
    for layer in model.layers:
        for name in layer.names:
            rows, *rest = model.checkpoint.tensors[name].shape
            if name.removeprefix(layer.prefix) in grown:
                found[name] = (count * rows, *rest)
            elif name.endswith(OUTPUT):
                found[name] = (rows, count * rest[0])
    return found


def _stacked(model: Model, name: str, count: int, share_kv: bool) -> common.Moves:
    """Rows of every model: model by model, or model by model below each key-value head."""
    whole = model.whole(name)
    groups = model.config.kv_heads if share_kv else 1
    rows = whole.shape[0] // groups
    target = Region(name, (count * whole.shape[0], *whole.shape[1:]))
    moves: common.Moves = []
    for group in range(groups):
        for source in range(count):
            start = (group * count + source) * rows
            read = replace(whole.rows(group * rows, (group + 1) * rows), source=source)
            moves.append((read, [target.rows(start, start + rows)]))
    return moves


def _output(
    model: Model,
    name: str,
    shape: Shape,
    layer: int | None,
    gates: Sequence[float],
    share_kv: bool,
) -> Unit:
    target = Region(name, shape)
    return Unit(
        f"fold.{name}",
        "transform",
        layer,
        reads=tuple(replace(model.whole(name), source=source) for source in range(len(gates))),
        writes=(target,),
        params={
            "part": "fold",
            "gates": list(gates),
            "groups": model.config.kv_heads if share_kv else 1,
        },
        memory=24 * target.count,
    )


def _exactness(
    mixture: common.Mixture, models: Sequence[Model], gates: Sequence[float]
) -> Exactness:
    if not branches.identical(models):
        return Exactness("approximate", "attentions and experts of different files are mixed")
    name = mixture.model.layers[0].prefix + OUTPUT
    rounded = mixture.model.dtype(name)
    if rounded not in {"F32", "F64"} and any(math.frexp(gate)[0] not in (0, 0.5) for gate in gates):
        return Exactness("approximate", f"gates that are no powers of two round in {rounded}")
    return common.identical_experts(mixture)
