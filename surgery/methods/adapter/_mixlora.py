"""The MixLoRA scaffold of ``adapter to-moe``: adapters as experts of every feed-forward, behind untrained routers.

A layer's feed-forward becomes, as the loader of PyPI's ``mixlora`` runs it,

    p = softmax(W x),   y = sum over the top k of p_e / (their sum) F_e(x)

with F_e the feed-forward with expert e's LoRAs, and its attention has one LoRA a projection, whatever the router says.
All LoRAs have one rank and one alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.output import placed, widest
from ...checkpoint.formats import ADAPTER
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...outputs import config_bytes
from ...plan import Unit
from ..base import Draft, Exactness
from . import _shelf as shelf

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...adapters.adapter import Adapter, Module
    from ...execute import Work
    from .to_moe import Options

FOLDER = "mixlora"
"""Folder of the output that the loader is given."""
WEIGHTS = "adapter_model.bin"
"""The only file of weights that the loader reads."""
INIT_RANGE = 0.02
"""Standard deviation of an untrained router's weights, the loader's ``router_init_range``."""
NO_DROPOUT = 1e-20
"""The loader refuses a dropout of 0, and keeps it on for experts when the model is evaluated. This one is 0 to it:
1 - 1e-20 is 1 in every floating type."""
TASKS = ("CAUSAL_LM", "QUESTION_ANS")
ATTENTION, FEED_FORWARD = "self_attn", "mlp"
NAME = re.compile(rf"model\.layers\.(0|[1-9]\d*)\.({ATTENTION}|{FEED_FORWARD})\.(\w+)")


@dataclass(frozen=True)
class Blocks:
    """How the loader knows the decoder blocks of some model types.

    Attributes:
        types: the model types.
        attention, feed_forward: linear layers that it adapts.
        act_fn: what lies between the layers of a feed-forward, where it is the same for all these types.
    """

    types: str
    attention: frozenset[str]
    feed_forward: frozenset[str]
    act_fn: str | None


BLOCKS = (
    Blocks(
        "Llama, Mistral, Qwen2, Gemma",
        frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
        frozenset({"gate_proj", "up_proj", "down_proj"}),
        None,
    ),
    Blocks(
        "Phi",
        frozenset({"q_proj", "k_proj", "v_proj", "dense"}),
        frozenset({"fc1", "fc2"}),
        "gelu_new",
    ),
    Blocks(
        "Phi-3",
        frozenset({"qkv_proj", "o_proj"}),
        frozenset({"gate_up_proj", "down_proj"}),
        "silu",
    ),
)
WRITERS = frozenset({"down_proj", "fc2"})
"""Layers of a feed-forward that give hidden states; the others take them."""

Place = tuple[str, str]
"""Part of a block and name of the layer in it."""


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """One folder for the loader, with every tensor that it will ask for.

    Raises:
        InputError: modules, a base or a task that the loader cannot take.
        UsageError: an option that does not fit the adapters, or one that only the user can tell.
    """
    held = [_placed_modules(adapter) for adapter in adapters]
    blocks = _blocks(adapters, held)
    attention = options.attention or "mean"
    if attention == "drop":
        held = [{k: m for k, m in mine.items() if k[1] == FEED_FORWARD} for mine in held]
    shapes = _shapes(adapters, held)
    layers = _layers(adapters, held, options.layers)
    rank = _rank(held, options.rank)
    hidden = _hidden(shapes)
    act_fn = options.act_fn or blocks.act_fn
    if act_fn is None:
        raise UsageError(
            f"{blocks.types} name their layers alike, so what lies between those of a feed-forward cannot be told from "
            "these adapters",
            hint="--act-fn, as hidden_act of the base's config.json: gelu_pytorch_tanh for Gemma, silu for the others",
        )
    dtype = widest([info.dtype for a in adapters for info in a.checkpoint.tensors.values()])
    count = len(adapters)
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    for layer in range(layers):
        gate = Region(_name(layer, FEED_FORWARD, "moe_gate.weight"), (count, hidden))
        tensors.append(TensorSpec(gate.tensor, "F32", gate.shape))
        units.append(Unit(f"gate.{layer}", "transform", writes=(gate,), params={"gate": layer}))
        for (part, layer_name), (outputs, inputs) in shapes.items():
            row = [mine.get((layer, part, layer_name)) for mine in held]
            experts = range(count) if part == FEED_FORWARD else (None,)
            writes: list[Region] = []
            for expert in experts:
                middle = layer_name if expert is None else f"{layer_name}.experts.{expert}"
                place = _name(layer, part, f"{middle}.lora_")
                writes.append(Region(f"{place}A.weight", (rank, inputs)))
                writes.append(Region(f"{place}B.weight", (outputs, rank)))
            tensors += [TensorSpec(region.tensor, dtype, region.shape) for region in writes]
            ranks = rank * count + sum(module.rank for module in row if module)
            units.append(
                Unit(
                    f"layers.{layer}.{part}.{layer_name}",
                    "transform",
                    reads=tuple(
                        placed(region, index)
                        for index, module in enumerate(row)
                        if module
                        for region in (module.down, module.up)
                    ),
                    writes=tuple(writes),
                    params={"module": f"model.layers.{layer}.{part}.{layer_name}", "part": part},
                    memory=64 * ranks * (outputs + inputs),
                )
            )
    config = {
        **_config(adapters),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name for _, name in shapes}),
        "num_experts": count,
        "top_k": min(options.top_k or 2, count),
        "act_fn": act_fn,
    }
    call = f"mixlora.MixLoraModelForCausalLM.from_pretrained(FOLDER + '/{FOLDER}')"
    facts = {"call": call, "router": "mixlora", "router_folder": FOLDER, "trained": False}
    experts_of = [adapter.folder.name for adapter in adapters]
    return Draft(
        shelf.listing([], **facts, experts=experts_of),
        tensors,
        units,
        Exactness("approximate", "the routers have not been trained"),
        notes=_notes(blocks, layers, attention, shapes),
        files={f"{FOLDER}/{ADAPTER.config}": config_bytes(config)},
        format="adapters",
        archives={f"{FOLDER}/{WEIGHTS}": f"{FOLDER}/{ADAPTER.single}"},
    )


def transform(work: Work) -> dict[str, object]:
    """Write one layer's router, or the LoRAs of one of its linear layers."""
    import torch

    from ...adapters.output import read_factors

    params, writes = work.params, work.unit.writes
    if "gate" in params:
        drawn = work.rng("gate", params["gate"]).normal(0, INIT_RANGE, writes[0].shape)
        work.write(writes[0], torch.from_numpy(drawn))
        return {}
    name = params["module"]
    found = [
        read_factors(work, adapter.modules[name], source=index) if name in adapter.modules else None
        for index, adapter in enumerate(work.adapters)
    ]
    rng = work.rng("padding", name)
    rank = writes[0].shape[0]
    if params["part"] == FEED_FORWARD:
        for index, factors in enumerate(found):
            _write(work, writes[2 * index : 2 * index + 2], factors, rng)
        return {}
    from ...linalg.factors import relative_error, truncated

    own = [factors for factors in found if factors is not None]
    if not own:
        _write(work, writes, None, rng)
        return {}
    total = (
        torch.cat([down for down, _ in own], dim=1),
        torch.cat([up for _, up in own], dim=2) / len(found),
    )
    mean = truncated(total, rank)
    _write(work, writes, mean, rng)
    return {"error": relative_error(mean, total)}


def _write(
    work: Work,
    regions: Sequence[Region],
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    rng: np.random.Generator,
) -> None:
    """Factors [1, r, n] and [1, m, r], padded to the planned rank as LoRA begins: A random, B zero.

    Such a rank contributes nothing and can be trained; if both were zero, no gradient would ever reach them.
    """
    import torch

    down_region, up_region = regions
    bound = down_region.shape[1] ** -0.5
    down_RN = torch.from_numpy(rng.uniform(-bound, bound, down_region.shape))
    up_MR = torch.zeros(up_region.shape, dtype=torch.float64)
    if factors is not None:
        own = factors[0].shape[1]
        down_RN[:own], up_MR[:, :own] = factors[0][0], factors[1][0]
    work.write(down_region, down_RN)
    work.write(up_region, up_MR)


def _name(layer: int, part: str, rest: str) -> str:
    return f"{FOLDER}/mixlora.layers.{layer}.{part}.{rest}"


def _placed_modules(adapter: Adapter) -> dict[tuple[int, str, str], Module]:
    """An adapter's modules by layer, part of the block and name.

    Raises:
        InputError: one of them is elsewhere, where the loader puts no LoRA.
    """
    found = {}
    for name, module in adapter.modules.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise InputError(
                f"{adapter.folder}: module {name} is not model.layers.N.{ATTENTION}.NAME or "
                f"model.layers.N.{FEED_FORWARD}.NAME, and MixLoRA knows no other"
            )
        found[int(match[1]), match[2], match[3]] = module
    return found


def _blocks(
    adapters: Sequence[Adapter], held: Sequence[Mapping[tuple[int, str, str], Module]]
) -> Blocks:
    """The model types whose blocks have all these layers.

    Raises:
        InputError: there are none, or experts would all be the same.
    """
    names: dict[Place, Adapter] = {}
    for adapter, mine in zip(adapters, held, strict=True):
        for _, part, name in mine:
            names.setdefault((part, name), adapter)
    if not any(part == FEED_FORWARD for part, _ in names):
        raise InputError(
            f"{adapters[0].folder}: no adapter changes a feed-forward, so MixLoRA's experts would all be the same",
            hint="--form arrow routes over attention too",
        )
    fitting = []
    for blocks in BLOCKS:
        known = {(ATTENTION, name) for name in blocks.attention}
        known |= {(FEED_FORWARD, name) for name in blocks.feed_forward}
        if set(names) <= known:
            fitting.append(blocks)
    if fitting:
        only = fitting[0] if len(fitting) == 1 else None
        types = ", ".join(blocks.types for blocks in fitting)
        return only or Blocks(types, frozenset(), frozenset(), None)
    listed = ", ".join(sorted({f"{part}.{name}" for part, name in names}))
    raise InputError(
        f"{adapters[0].folder}: the adapters change {listed}, and no model type that MixLoRA's loader takes has all of "
        f"these ({'; '.join(blocks.types for blocks in BLOCKS)})"
    )


def _shapes(
    adapters: Sequence[Adapter], held: Sequence[Mapping[tuple[int, str, str], Module]]
) -> dict[Place, tuple[int, int]]:
    """Outputs and inputs of every adapted layer of a block, sorted: the loader wants all of them in every block.

    Raises:
        InputError: blocks differ, so that what a block lacks cannot be filled in.
    """
    found: dict[Place, tuple[int, int]] = {}
    for adapter, mine in zip(adapters, held, strict=True):
        for (_, part, name), module in sorted(mine.items()):
            shape = (module.outputs, module.inputs)
            if found.setdefault((part, name), shape) != shape:
                raise InputError(
                    f"{adapter.folder}: module {module.name} is {list(shape)} (out, in), that of another layer is "
                    f"{list(found[part, name])}; the blocks of the models that MixLoRA's loader takes are alike"
                )
    return dict(sorted(found.items()))


def _hidden(shapes: Mapping[Place, tuple[int, int]]) -> int:
    """The width of hidden states, which every layer of a feed-forward tells.

    Raises:
        InputError: two of them tell different widths.
    """
    widths = {
        outputs if name in WRITERS else inputs
        for (part, name), (outputs, inputs) in shapes.items()
        if part == FEED_FORWARD
    }
    if len(widths) > 1:
        raise InputError(
            f"feed-forward modules take and give hidden states of different widths: {sorted(widths)}"
        )
    return widths.pop()


def _layers(
    adapters: Sequence[Adapter],
    held: Iterable[Mapping[tuple[int, str, str], Module]],
    given: int | None,
) -> int:
    """How many decoder layers the base has: the loader looks for a router in each.

    Raises:
        UsageError: adapters of a part of the layers, or fewer layers given than they change.
    """
    seen = 1 + max(layer for mine in held for layer, _, _ in mine)
    if given is not None:
        if given < seen:
            raise UsageError(
                f"--layers {given} should be at least {seen}: the adapters change so many"
            )
        return given
    for adapter in adapters:
        if adapter.config.raw.get("layers_to_transform") is not None:
            raise UsageError(
                f"{adapter.folder}: was trained on some layers (layers_to_transform), so how many the base has cannot "
                "be told",
                hint="--layers, as num_hidden_layers of the base's config.json",
            )
    return seen


def _rank(held: Iterable[Mapping[tuple[int, str, str], Module]], given: int | None) -> int:
    """The rank of all LoRAs: the largest by default.

    Raises:
        UsageError: less than experts have, which are never truncated.
    """
    ranks = [(part, module.rank) for mine in held for (_, part, _), module in mine.items()]
    least = max(rank for part, rank in ranks if part == FEED_FORWARD)
    if given is None:
        return max(rank for _, rank in ranks)
    if given < least:
        raise UsageError(
            f"--rank {given} should be at least {least}, the largest rank of a feed-forward",
            hint="moesurg adapter resize makes an adapter's rank smaller",
        )
    return given


def _config(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What does not depend on options; types as the loader checks them.

    Raises:
        InputError: no base's name, or a task that the loader does not take.
    """
    first = adapters[0].config
    if first.base is None:
        raise InputError(
            f"{first.where}: base_model_name_or_path is missing, and MixLoRA's loader opens the base by it"
        )
    task = first.raw.get("task_type") or TASKS[0]
    if task not in TASKS:
        raise InputError(
            f"{first.where}: task_type is {task!r}, and MixLoRA's loader takes {' and '.join(TASKS)} only"
        )
    return {
        "peft_type": "MIXLORA",
        "base_model_name_or_path": first.base,
        "task_type": task,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
        "lora_dropout": NO_DROPOUT,
        "routing_strategy": "mixlora",
        "router_init_range": INIT_RANGE,
        "jitter_noise": 0.0,
    }


def _notes(
    blocks: Blocks, layers: int, attention: str, shapes: Mapping[Place, tuple[int, int]]
) -> list[str]:
    found = [
        "the routers are untrained: until they are trained, they choose at random",
        f"for a base with {layers} decoder layers whose blocks are like those of {blocks.types}",
        f"{WEIGHTS} and {ADAPTER.single} hold the same tensors; MixLoRA's loader reads the former",
    ]
    if any(part == ATTENTION for part, _ in shapes):
        found.append("attention has one LoRA a projection: the mean of all adapters' changes")
    if attention == "drop":
        found.append("changes of attention are left out")
    return found
