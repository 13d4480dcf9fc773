"""The MixLoRA scaffold of ``adapter to-moe``: adapters as experts of every feed-forward, behind untrained routers.

A layer's feed-forward becomes, as the loader of PyPI's ``mixlora`` runs it,

    p = softmax(W x),   y = sum over the top k of p_e / (their sum) F_e(x)

with F_e the feed-forward with expert e's LoRAs, and its attention has one LoRA a projection, whatever the router says.
All LoRAs have one rank and one alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ...adapters.output import placed, widest
from ...checkpoint.formats import ADAPTER
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import UsageError
from ...outputs import config_bytes
from ...plan import Unit
from ..base import Draft, Exactness
from . import _mixlora_facts as facts
from . import _shelf as shelf

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...adapters.adapter import Adapter
    from ...execute import Work
    from .to_moe import Options

FOLDER = "mixlora"
"""Folder of the output that the loader is given."""
WEIGHTS = "adapter_model.bin"
"""The only file of weights that the loader reads."""


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """One folder for the loader, with every tensor that it will ask for.

    Raises:
        InputError: modules, a base or a task that the loader cannot take.
        UsageError: an option that does not fit the adapters, or one that only the user can tell.
    """
    held = [facts.placed_modules(adapter) for adapter in adapters]
    blocks = facts.blocks_of(adapters, held)
    attention = options.attention or "mean"
    if attention == "drop":
        held = [{k: m for k, m in mine.items() if k[1] == facts.FEED_FORWARD} for mine in held]
    shapes = facts.shapes_of(adapters, held)
    layers = facts.count_layers(adapters, held, options.layers)
    rank = facts.common_rank(held, options.rank)
    hidden = facts.hidden_size(shapes)
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
        gate = Region(_name(layer, facts.FEED_FORWARD, "moe_gate.weight"), (count, hidden))
        tensors.append(TensorSpec(gate.tensor, "F32", gate.shape))
        units.append(Unit(f"gate.{layer}", "transform", writes=(gate,), params={"gate": layer}))
        for (part, layer_name), (outputs, inputs) in shapes.items():
            row = [mine.get((layer, part, layer_name)) for mine in held]
            experts = range(count) if part == facts.FEED_FORWARD else (None,)
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
        **facts.fixed_config(adapters),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name for _, name in shapes}),
        "num_experts": count,
        "top_k": min(options.top_k or 2, count),
        "act_fn": act_fn,
    }
    call = f"mixlora.MixLoraModelForCausalLM.from_pretrained(FOLDER + '/{FOLDER}')"
    listed = {"call": call, "router": "mixlora", "router_folder": FOLDER, "trained": False}
    experts_of = [adapter.folder.name for adapter in adapters]
    return Draft(
        shelf.listing([], **listed, experts=experts_of),
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
        drawn = work.rng("gate", params["gate"]).normal(0, facts.INIT_RANGE, writes[0].shape)
        work.write(writes[0], torch.from_numpy(drawn))
        return {}
    name = params["module"]
    found = [
        read_factors(work, adapter.modules[name], source=index) if name in adapter.modules else None
        for index, adapter in enumerate(work.adapters)
    ]
    rng = work.rng("padding", name)
    rank = writes[0].shape[0]
    if params["part"] == facts.FEED_FORWARD:
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


def _notes(
    blocks: facts.Blocks, layers: int, attention: str, shapes: Mapping[facts.Place, tuple[int, int]]
) -> list[str]:
    found = [
        "the routers are untrained: until they are trained, they choose at random",
        f"for a base with {layers} decoder layers whose blocks are like those of {blocks.types}",
        f"{WEIGHTS} and {ADAPTER.single} hold the same tensors; MixLoRA's loader reads the former",
    ]
    if any(part == facts.ATTENTION for part, _ in shapes):
        found.append("attention has one LoRA a projection: the mean of all adapters' changes")
    if attention == "drop":
        found.append("changes of attention are left out")
    return found
