"""Split an adapter into experts of one or a few ranks, which add up to it.

    B A = U S Vᵀ = sum_j s_j u_j v_jᵀ,   part p: the ranks j of its share, with the root of s_j on each side

so the first part is the strongest, parts of one rank are orthogonal to each other, and stacking all parts (`merge
--method cat`) gives the adapter back. Rank-one experts are what rank-wise mixtures such as SMoRA (arXiv:2501.15103)
route over; routing needs training, which this does not do. The output has a folder for each part; a module with fewer
ranks than parts is in the first parts only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...adapters.output import Written, layout_of, widest
from ...adapters.packing import LAYOUTS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _shelf as shelf

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work

INFO = MethodInfo(
    summary="split an adapter into experts of one or a few ranks that add up to it",
    paper="arXiv:2501.15103",
    inputs="one LoRA adapter",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    ranks: int = option(1, "ranks of each expert")
    expert_layout: str | None = option(
        None, "how stacked experts' second factors are stored", choices=LAYOUTS
    )


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """A folder for each expert.

    Raises:
        InputError: more than one adapter, or one with more than low-rank factors.
        UsageError: no rank at all.
    """
    if len(adapters) != 1:
        raise InputError(f"splitting takes one adapter, {len(adapters)} were given")
    if options.ranks < 1:
        raise UsageError(f"--ranks {options.ranks} should be at least 1")
    adapter = adapters[0]
    if adapter.full or any(module.bias is not None for module in adapter.modules.values()):
        raise InputError(
            f"{adapter.folder}: holds biases or modules in full, which belong to no single rank",
            hint="split an adapter without lora_bias and modules_to_save",
        )
    layout = layout_of(adapter, options.expert_layout)
    most = max(module.rank for module in adapter.modules.values())
    count = -(-most // options.ranks)
    digits = len(str(count - 1))
    members: list[list[Written]] = [[] for _ in range(count)]
    names = [f"expert_{part:0{digits}d}" for part in range(count)]
    units = []
    for name, module in adapter.modules.items():
        dtype = widest(
            [adapter.checkpoint.tensors[r.tensor].dtype for r in (module.down, module.up)]
        )
        parts = []
        for part in range(count):
            ranks = min(options.ranks, module.rank - part * options.ranks)
            if ranks > 0:
                members[part].append(Written(module, ranks, dtype))
                parts.append(ranks)
        writes = tuple(
            region
            for part in range(len(parts))
            for region in shelf.place(members[part][-1], names[part]).regions
        )
        units.append(
            Unit(
                name,
                "transform",
                reads=(module.down, module.up),
                writes=writes,
                params={"module": name, "layout": layout, "ranks": parts},
                memory=64 * (module.down.count + module.up.count),
            )
        )
    found = [
        shelf.Member(name, entries, {"first_rank": part * options.ranks})
        for part, (name, entries) in enumerate(zip(names, members, strict=True))
    ]
    return Draft(
        shelf.listing(found, sum="the members stacked are the adapter they were made from"),
        shelf.specs(found),
        units,
        Exactness("exact", "the experts add up to the adapter"),
        files=shelf.files(found, adapters),
        format="adapters",
    )


def transform(work: Work) -> dict[str, object]:
    """Split one module."""
    from ...adapters import packing
    from ...adapters.output import read_factors
    from ...linalg.factors import svd

    module = work.adapters[0].modules[work.params["module"]]
    factors = read_factors(work, module, source=0, layout=work.params["layout"])
    u, s, vt = svd(factors)
    lacking = module.rank - s.shape[1]
    if lacking > 0:  # a rank above the width of the module: the rest is zero
        import torch

        u = torch.cat([u, u.new_zeros(*u.shape[:2], lacking)], dim=2)
        vt = torch.cat([vt, vt.new_zeros(vt.shape[0], lacking, vt.shape[2])], dim=1)
        s = torch.cat([s, s.new_zeros(s.shape[0], lacking)], dim=1)
    root, at = s.sqrt(), 0
    for part, ranks in enumerate(work.params["ranks"]):
        chosen = slice(at, at + ranks)
        down_region, up_region = work.unit.writes[2 * part : 2 * part + 2]
        down = vt[:, chosen] * root[:, chosen, None]
        up = u[:, :, chosen] * root[:, None, chosen]
        work.write(down_region, packing.pack_down(down, down_region.shape))
        work.write(up_region, packing.pack_up(up, up_region.shape))
        at += ranks
    return {"singular_values": [float(value) for value in s.square().sum(0).sqrt()]}
