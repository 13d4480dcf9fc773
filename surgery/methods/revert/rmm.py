"""Take one adapter out of a pack that ``merge --method rmm`` wrote.

    x = b + U z_i

at every position of every module the adapter had, and A and B from the positions. The output is a PEFT adapter of
the adapter's own ranks with scale 1 (alpha = rank), whatever its alpha was: the scale is in the factors. Where the
pack turned the adapter's ranks to another's, they stay turned, which changes neither product nor function. An
adapter whose rank was filled up is cut to its own rank by singular values, which loses nothing if the pack lost
nothing. A pack made with ``--exact-factors`` turns them back, takes the scales out again and gives the adapter its own
config and type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...adapters.adapter import Module
from ...adapters.config import AdapterConfig
from ...adapters.output import Written
from ...checkpoint.formats import PACK
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo
from ._task import TaskOptions as Options

if TYPE_CHECKING:
    from ...execute import Work
    from ...linalg.factors import Factors
    from ...packs import Pack

__all__ = ["INFO", "Options", "plan", "transform"]

INFO = MethodInfo(
    summary="an adapter from a pack of basis and coefficients",
    paper="arXiv:2510.14163",
    inputs="a pack written by merge --method rmm",
    data="none",
    takes="packs",
)


def plan(packs: Sequence[Pack], options: Options) -> Draft:
    """Every module that the adapter had."""
    pack = packs[0]
    index = pack.index(options.task)
    task = pack.tasks[index]
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    lossless = True
    for name, part in pack.parts.items():
        if index not in part["tasks"]:
            continue
        written = _written(name, part, task["ranks"][name], index)
        specs.extend(written.specs)
        keys = ["mean", *(("basis", "coefficients") if part["basis"] else ())]
        keys += ["turns"] if "types" in part else []
        reads = tuple(Region(f"{name}.{key}", pack.shape(f"{name}.{key}")) for key in keys)
        units.append(
            Unit(
                name,
                "transform",
                reads=reads,
                writes=written.regions,
                params={"module": name, "task": index},
                memory=8 * 4 * sum(region.count for region in reads),
            )
        )
        lossless &= part["basis"] == min(len(part["tasks"]) - 1, part["rank"])
    return Draft(
        dict(task["config"]),
        specs,
        units,
        Exactness("exact", "the pack's basis spans all its adapters")
        if lossless
        else Exactness("approximate", "the adapter is rebuilt from a part of the directions"),
        format="adapter",
    )


def transform(work: Work) -> dict[str, object]:
    """Rebuild one module."""
    from ...adapters import packing
    from ...checkpoint.dtypes import torch_dtype
    from ...linalg import factors as products
    from ...linalg import reversible

    pack: Any = work.sources[0]
    name, index = work.params["module"], work.params["task"]
    part, rank = pack.parts[name], pack.tasks[index]["ranks"][name]
    found = {
        region.tensor.removeprefix(f"{name}."): work.read(region).double()
        for region in work.unit.reads
    }
    place = part["tasks"].index(index)
    positions = found["mean"]
    if part["basis"]:
        positions = reversible.rebuild(positions, found["basis"], found["coefficients"][..., place])
    factors = reversible.to_factors(positions, part["experts"], part["inputs"], part["outputs"])
    if "types" in part:
        down, up = reversible.turned(factors, found["turns"][place].mT)
        factors = _unfolded((down[:, :rank], up[..., :rank]), pack, name, index)
    elif rank < part["rank"]:
        factors = products.truncated(factors, rank)
    down, up = factors
    written = _written(name, part, rank, index)
    work.write(written.down, packing.pack_down(down.contiguous(), written.down.shape))
    work.write(written.up, packing.pack_up(up, written.up.shape))
    kind = torch_dtype(written.dtype)
    rounded = (down.to(kind).double(), up.to(kind).double())
    return {"rank": rank, "stored_error": products.relative_error(rounded, factors)}


def _unfolded(factors: Factors, pack: Pack, name: str, index: int) -> Factors:
    """Factors without the scale, which the adapter's own config gives again."""
    config = AdapterConfig(pack.tasks[index]["original"], str(pack.folder / PACK.config))
    scale = config.scale_of(name, pack.tasks[index]["ranks"][name])
    root = math.sqrt(abs(scale))
    return factors[0] / math.copysign(root, scale), factors[1] / root


def _written(name: str, part: dict[str, Any], rank: int, index: int) -> Written:
    down, up, experts = part["down"], part["up"], part["experts"]
    module = Module(
        name,
        part["kind"],
        Region(down[0], (experts * rank, *down[1])),
        Region(up[0], (part["outputs"], experts * rank, *up[1])),
        None,
        rank,
        1.0,
        experts,
    )
    own = part["types"][part["tasks"].index(index)] if "types" in part else part["dtype"]
    return Written(module, rank, own)
