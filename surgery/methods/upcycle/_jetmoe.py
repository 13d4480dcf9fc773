"""Attention experts in a stock class: JetMoE, whose experts of attention share keys and values.

JetMoE selects as many experts of attention as of feed-forwards, of one number of both, and weighs the selected by a
softmax of their logits. With all N selected that is BAM's soft mixture, of attentions around shared keys and values
and, other than in BAM, of feed-forwards too. What the class does not have, a parent must not need: biases, norms on
query and key, a sliding window, another epsilon in its norms than 1e-6, and fewer key-value heads than query heads,
which are repeated (lossless; the cache grows by as much).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...architectures.config import both_rope_spellings
from ...architectures.jetmoe import FAMILY, STOCK
from ...architectures.model import Experts
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness
from . import _branches as branches
from . import _common as common
from . import _routers as routers
from ._routers import RouterOptions

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model
    from ...execute import Work

NAME = FAMILY.model_type
PARENTS = ("llama", "mistral")
"""Families whose blocks differ from JetMoE's in no more than `_check` looks at."""
EPSILON = 1e-6
"""What the norms of JetMoE's layers add, whatever the config says."""
ROUTER = "self_attention.experts.router.layer.weight"
QUERY, OUTPUT = (
    "self_attention.experts.input_linear.weight",
    "self_attention.experts.output_linear.weight",
)
KEY_VALUE = "self_attention.kv_proj.weight"
BIASES = ("self_attention.experts.bias", "mlp.bias")
UNKNOWN = (
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "head_dim",
    "sliding_window",
    "pretraining_tp",
)
"""Config keys of parents that JetMoE does not have, or spells otherwise."""


def plan(
    models: Sequence[Model],
    options: RouterOptions,
    *,
    kv: str,
    top_k: int | None,
    notes: list[str],
) -> Draft:
    """The models as one JetMoE.

    Raises:
        InputError: a parent that the class cannot hold, with the reason.
        UsageError: options that it has no choice of.
    """
    model, count = models[0], len(models)
    _check(model)
    if kv != "shared":
        raise UsageError(
            "--target jetmoe: its attention experts share keys and values",
            hint="add --kv shared, or leave out --target for keys and values of every expert's own",
        )
    if top_k not in (None, count):
        raise UsageError(
            f"--target jetmoe selects as many feed-forwards as attentions, and BAM mixes all {count} of these",
            hint="leave out --top-k",
        )
    common.check_counts(count, count, options.router_std)
    routers.check(options, count, count)
    config = model.config
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    owners = {name: layer for layer in model.layers for name in layer.names}
    for name in model.names():
        layer = owners.get(name)
        own = name.removeprefix(layer.prefix) if layer else name
        if layer is None or own.endswith("layernorm.weight"):
            tensors.append(
                TensorSpec(name, model.dtype(name), model.checkpoint.tensors[name].shape)
            )
            units.extend(
                branches.averages(model.whole(name), count, layer.index if layer else None)
            )
        elif own == "self_attn.q_proj.weight":
            new, made = _layer(models, layer, options)
            tensors.extend(new)
            units.extend(made)
    units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    raw = {key: value for key, value in config.completed().items() if key not in UNKNOWN}
    raw.update(
        model_type=NAME,
        architectures=[FAMILY.class_name],
        activation_function=config.get("hidden_act"),
        kv_channels=config.head_dim,
        num_attention_heads=config.heads * count,
        num_key_value_heads=config.heads,
        num_local_experts=count,
        num_experts_per_tok=count,
        tie_word_embeddings=config.tied,
        output_router_logits=False,
    )
    repeated = config.heads // config.kv_heads
    if repeated > 1:
        notes.append(
            f"every key-value head is written {repeated} times, so that the cache is {repeated} times the dense model's"
        )
    draft = Draft(both_rope_spellings(raw), tensors, units, _exactness(models), notes=notes)
    return routers.asking(draft, options, count)


def fill(work: Work) -> dict[str, object]:
    """Write one layer's keys or values: the mean of the models', each head as often as query heads read it."""
    import torch

    repeat, first = work.params["repeat"], 0
    for target in work.unit.writes:
        last = first + target.shape[0] // repeat
        total = torch.zeros(last - first, target.shape[1], dtype=torch.float64)
        for region in work.unit.reads:
            total += work.read(region.rows(first, last)).double()
        total /= len(work.unit.reads)
        work.write(target, total.repeat(repeat, 1))
        first = last
    return {}


def _layer(
    models: Sequence[Model], layer: Layer, options: RouterOptions
) -> tuple[list[TensorSpec], list[Unit]]:
    """Tensors and units of a layer, but for its norms."""
    model, count = models[0], len(models)
    config, prefix, index = model.config, layer.prefix, layer.index
    hidden, width = config.hidden, config.integer("intermediate_size")
    rows = config.heads * config.head_dim
    experts = Experts(STOCK, prefix, count, hidden, width)
    attention, feed = (
        model.dtype(prefix + "self_attn.q_proj.weight"),
        model.dtype(layer.ffn["gate"].tensor),
    )
    shapes = {
        QUERY: (attention, (count, rows, hidden)),
        OUTPUT: (attention, (count, hidden, rows)),
        ROUTER: (attention, (count, hidden)),
        KEY_VALUE: (attention, (2 * rows, hidden)),
        BIASES[0]: (attention, (hidden,)),
        BIASES[1]: (feed, (hidden,)),
        **{
            name: (feed, shape)
            for name, shape in experts.layout.shapes(count, hidden, width).items()
        },
    }
    tensors = [TensorSpec(prefix + name, dtype, shape) for name, (dtype, shape) in shapes.items()]
    moves = branches.experts(models, layer, experts)
    for name, stacked in (("q", QUERY), ("o", OUTPUT)):
        whole = model.whole(f"{prefix}self_attn.{name}_proj.weight")
        target = Region(prefix + stacked, (count * whole.shape[0], whole.shape[1]))
        for number in range(count):
            part = target.rows(number * whole.shape[0], (number + 1) * whole.shape[0])
            moves.append((replace(whole, source=number), [part]))
    units = [copy_unit(f"layer.{index}.copies", moves, layer=index)]
    both = Region(prefix + KEY_VALUE, (2 * rows, hidden))
    repeat = config.heads // config.kv_heads
    size = repeat * config.head_dim
    for half, name in enumerate(("k", "v")):
        whole = model.whole(f"{prefix}self_attn.{name}_proj.weight")
        units.append(
            Unit(
                f"layer.{index}.{name}",
                "transform",
                index,
                reads=tuple(replace(whole, source=number) for number in range(count)),
                writes=tuple(
                    both.rows(half * rows + start, half * rows + start + size)
                    for start in range(0, rows, size)
                ),
                params={"part": "repeat", "repeat": repeat},
                memory=32 * size * hidden,
            )
        )
    zeros = tuple(Region(prefix + name, (hidden,)) for name in BIASES)
    units.append(
        Unit(f"layer.{index}.biases", "transform", index, writes=zeros, params={"part": "zeros"})
    )
    router = Region(prefix + ROUTER, (count, hidden))
    units.append(routers.unit(layer, experts, options))
    units.append(
        Unit(
            f"layer.{index}.attention_router",
            "transform",
            index,
            writes=(router,),
            params={"part": "attention-router", "std": options.router_std},
            memory=16 * router.count,
        )
    )
    return tensors, units


def _check(model: Model) -> None:
    config, parent = model.config, model.family.model_type
    reason = ""
    if parent not in PARENTS:
        reason = f"blocks of {parent} are not JetMoE's: its norms come first, and it has none on query and key"
    elif config.flag("attention_bias") or config.flag("mlp_bias"):
        reason = "it has biases, and JetMoE's projections have none"
    elif config.get("sliding_window") is not None:
        reason = "its attention has a sliding window, and JetMoE's has none"
    if reason:
        raise InputError(
            f"{model.folder}: cannot become jetmoe: {reason}",
            hint="leave out --target; outputs with model code hold its attention experts",
        )


def _exactness(models: Sequence[Model]) -> Exactness:
    if not branches.identical(models):
        return Exactness("approximate", "attentions and experts of different files are mixed")
    found = models[0].config.number("rms_norm_eps", EPSILON)
    if found != EPSILON:
        return Exactness(
            "approximate",
            f"JetMoE's norms add {EPSILON:g} where the parent's add {found:g}: inputs of mean square v come out larger "
            f"by a share of about {(found - EPSILON) / 2:.2g} / v",
        )
    return Exactness(
        "exact", "identical attentions and feed-forwards under weights that sum to one"
    )
