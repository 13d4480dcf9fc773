"""What MixLoRA's loader asks of adapters: where their modules are, how blocks look, and its config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter, Module

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


def placed_modules(adapter: Adapter) -> dict[tuple[int, str, str], Module]:
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


def blocks_of(
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


def shapes_of(
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


def hidden_size(shapes: Mapping[Place, tuple[int, int]]) -> int:
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


def count_layers(
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


def common_rank(held: Iterable[Mapping[tuple[int, str, str], Module]], given: int | None) -> int:
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


def fixed_config(adapters: Sequence[Adapter]) -> dict[str, Any]:
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
