"""Make adapters into the experts of an Arrow mixture, which routes without training.

    prototype_e = leading right singular vector of B_e A_e,   score_e(x) = |x · prototype_e|,   top-k, softmax

Ostapenko et al., arXiv:2405.11157, as PEFT's ``create_arrow_model`` runs it. PEFT wants every expert with the same
rank and the same modules, all of them linear: experts are padded with zero ranks to the largest rank, and a module
that an expert lacks becomes zeros there. Scales are folded in, so that the mixture of experts trained with different
alphas is what each was trained as. The output has a folder for each expert and ``shelf.json`` with the call that
loads them.

PEFT computes the prototypes itself when the model is made, by power iteration from a random start. Those written to
``shared.safetensors`` ([experts, in] for each module, float32) are exact; they tell what routing will look like, and
serve loaders that can be given prototypes. An expert of zeros has the prototype zero and is never preferred.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters.output import Written, aligned, check_agreement, placed, widest
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _shelf as shelf

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work

INFO = MethodInfo(
    summary="make adapters into an Arrow mixture, whose routing needs no training",
    paper="arXiv:2405.11157",
    inputs="two or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    top_k: int = option(3, "experts that the call in shelf.json lets a token use")
    temperature: float = option(1.0, "temperature of the call's softmax over scores")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """A folder for each expert, all of one shape.

    Raises:
        InputError: fewer than two adapters, adapters that do not belong together, or modules that Arrow cannot hold.
        UsageError: an option out of range.
    """
    if len(adapters) < 2:
        raise InputError(f"a mixture needs two or more adapters, {len(adapters)} was given")
    if not options.top_k >= 1:
        raise UsageError(f"--top-k {options.top_k} should be at least 1")
    if not options.temperature > 0:
        raise UsageError(f"--temperature {options.temperature} should be above 0")
    check_agreement(adapters)
    for adapter in adapters:
        for module in adapter.modules.values():
            if module.kind != "linear" or module.bias is not None:
                raise InputError(
                    f"{adapter.folder}: module {module.name} is no plain linear layer, and Arrow takes no other"
                )
        if adapter.full:
            raise InputError(f"{adapter.folder}: modules_to_save cannot be routed over")
    rank = max(module.rank for adapter in adapters for module in adapter.modules.values())
    names = _names(adapters)
    rows = aligned(adapters)
    written: list[list[Written]] = [[] for _ in adapters]
    units, prototypes = [], []
    for name, row in rows.items():
        model = next(module for module in row if module is not None)
        types = [
            adapters[index].checkpoint.tensors[region.tensor].dtype
            for index, module in enumerate(row)
            if module is not None
            for region in (module.down, module.up)
        ]
        entry = Written(model, rank, widest(types))
        for entries in written:
            entries.append(entry)
        region = Region(f"prototypes.{name}", (len(adapters), model.inputs))
        prototypes.append(TensorSpec(region.tensor, "F32", region.shape))
        units.append(
            Unit(
                name,
                "transform",
                reads=tuple(
                    placed(part, index)
                    for index, module in enumerate(row)
                    if module is not None
                    for part in (module.down, module.up)
                ),
                writes=(
                    *(r for folder in names for r in shelf.place(entry, folder).regions),
                    region,
                ),
                params={"module": name, "rank": rank},
                memory=64 * len(adapters) * (entry.down.count + entry.up.count),
            )
        )
    members = [
        shelf.Member(folder, entries, {"source": adapter.folder.name})
        for folder, entries, adapter in zip(names, written, adapters, strict=True)
    ]
    top_k = min(options.top_k, len(adapters))
    call = (
        "peft.tuners.lora.create_arrow_model(base_model, task_specific_adapter_paths=["
        + ", ".join(f"FOLDER + '/{name}'" for name in names)
        + f"], arrow_config=peft.ArrowConfig(top_k={top_k}, router_temperature={options.temperature:g}, rng_seed=0))"
    )
    notes = ["the routing has not been trained: Arrow needs none, but nothing here has measured it"]
    return Draft(
        shelf.listing(members, call=call, router="arrow", trained=False),
        [*shelf.specs(members), *prototypes],
        units,
        Exactness("exact", "each folder holds its adapter's own change, padded"),
        notes=notes,
        files=shelf.files(members, adapters),
        format="adapters",
    )


def transform(work: Work) -> dict[str, object]:
    """Pad one module of every expert, and find its prototypes."""
    import torch

    from ...adapters.output import read_factors
    from ...linalg.factors import svd

    params, rank = work.params, work.params["rank"]
    *regions, prototypes = work.unit.writes
    found = torch.zeros(prototypes.shape, dtype=torch.float64)
    for index, adapter in enumerate(work.adapters):
        down_region, up_region = regions[2 * index : 2 * index + 2]
        down = torch.zeros(down_region.shape, dtype=torch.float64)
        up = torch.zeros(up_region.shape, dtype=torch.float64)
        module = adapter.modules.get(params["module"])
        if module is not None:
            factors = read_factors(work, module, source=index)
            own = min(rank, module.rank)
            down[:own], up[:, :own] = factors[0][0], factors[1][0]
            _, s, vt = svd(factors)
            if float(s[0, 0]) > 0:
                found[index] = vt[0, 0]
        work.write(down_region, down)
        work.write(up_region, up)
    work.write(prototypes, found)
    cosines = (found @ found.T).abs()
    return {"prototype_cosines": [[round(float(value), 6) for value in row] for row in cosines]}


def _names(adapters: Sequence[Adapter]) -> list[str]:
    """A folder name for each adapter: that of its own folder, numbered where two agree."""
    plain = [
        re.sub(r"[^\w.-]", "_", Path(adapter.folder).resolve().name) or "adapter"
        for adapter in adapters
    ]
    return [
        name if plain.count(name) == 1 else f"{name}_{plain[:index].count(name)}"
        for index, name in enumerate(plain)
    ]
