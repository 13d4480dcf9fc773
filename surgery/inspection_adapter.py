"""What an adapter is, told from its config and headers alone: which modules it changes, at what ranks and scales."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .adapters.adapter import Adapter, Module
from .checkpoint.formats import ADAPTER
from .inspection_facts import count, dtypes, natural, provenance, shards
from .methods import methods


def inspect_adapter(source: str, folder: Path) -> dict[str, Any]:
    """The facts of an adapter.

    Ranks are of one expert where experts are stacked. ``changed`` counts the elements of the matrices that the
    adapter changes, so that ``factors / changed`` says how much smaller it is than they.

    Raises:
        InputError: what no operation on adapters would take, with the reason.
    """
    adapter = Adapter.open(folder)
    config = adapter.config
    modules = sorted(adapter.modules.values(), key=lambda module: natural(module.name))
    rows = [_row(adapter, module) for module in modules]
    full = [
        {
            "tensor": name,
            "dtype": adapter.checkpoint.tensors[region.tensor].dtype,
            "shape": list(region.shape),
            "parameters": region.count,
        }
        for name, region in sorted(adapter.full.items())
    ]
    biases = sum(module.bias.count for module in modules if module.bias is not None)
    saved = sum(region.count for region in adapter.full.values())
    total = sum(count(info.shape) for info in adapter.checkpoint.tensors.values())
    record: dict[str, Any] = {
        "format": ADAPTER.name,
        "source": source,
        "folder": str(folder),
        "base": {"name": config.base, "revision": config.raw.get("revision")},
        "task": config.raw.get("task_type"),
        "initialisation": config.raw.get("init_lora_weights", True),
        "modules": {
            "count": len(modules),
            "kinds": dict(sorted(Counter(module.kind for module in modules).items())),
            "names": dict(sorted(Counter(leaf(module.name) for module in modules).items())),
            "layers": _layers(adapter.modules),
        },
        "scaling": "alpha / sqrt(rank)" if config.rslora else "alpha / rank",
        "ranks": _ranks(rows),
        "lora_bias": config.lora_bias,
        "base_transposed": config.transposed,
        "experts": _experts(adapter),
        "full": full,
        "parameters": {
            "total": total,
            "factors": total - biases - saved,
            "biases": biases,
            "full": saved,
            "changed": sum(module.experts * module.outputs * module.inputs for module in modules),
        },
        "dtypes": dtypes(adapter.checkpoint),
        "bytes": sum(info.nbytes for info in adapter.checkpoint.tensors.values()),
        "tensors": len(adapter.checkpoint.tensors),
        "shards": shards(adapter.checkpoint),
        "per_module": rows,
        "methods": [
            {"command": method.command, "name": method.name, "summary": method.info.summary}
            for method in methods()
            if method.info.takes in ("adapters", "model and adapters")
        ],
    }
    origin = provenance(folder)
    if origin is not None:
        record["provenance"] = origin
    return record


def leaf(name: str) -> str:
    """The last name of a module's path, without the ``base_layer`` of two targeted parameters of one module."""
    return name.removesuffix(".base_layer").rpartition(".")[2]


def _row(adapter: Adapter, module: Module) -> dict[str, Any]:
    regions = [region for region in (module.down, module.up, module.bias) if region is not None]
    infos = [adapter.checkpoint.tensors[region.tensor] for region in regions]
    return {
        "module": module.name,
        "kind": module.kind,
        "outputs": module.outputs,
        "inputs": module.inputs,
        "experts": module.experts,
        "rank": module.rank,
        "alpha": adapter.config.alpha_of(module.name),
        "scale": module.scale,
        "parameters": sum(region.count for region in regions),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": sorted({info.dtype for info in infos}),
    }


def _ranks(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many modules have each rank, alpha and scale, the most frequent first."""
    found = Counter((row["rank"], row["alpha"], row["scale"]) for row in rows)
    return [
        {"rank": rank, "alpha": alpha, "scale": scale, "modules": number}
        for (rank, alpha, scale), number in sorted(
            found.items(), key=lambda item: (-item[1], item[0])
        )
    ]


def _layers(names: Iterable[str]) -> list[int]:
    """The first number in every path, which is the layer's in all decoders; sorted, without those that have none."""
    found: set[int] = set()
    for name in names:
        numbers = [part for part in name.split(".") if part.isdecimal()]
        found.update(map(int, numbers[:1]))
    return sorted(found)


def _experts(adapter: Adapter) -> dict[str, Any] | None:
    """Of stacked experts: their numbers, the parameters they belong to, and whether their order can be told."""
    stacked = [module for module in adapter.modules.values() if module.kind == "experts"]
    if not stacked:
        return None
    told = all(1 in (module.experts, module.rank) for module in stacked)
    return {
        "modules": len(stacked),
        "counts": sorted({module.experts for module in stacked}),
        "parameters": list(adapter.config.parameters),
        "layout": "both layouts are the same" if told else "cannot be told from the file",
    }


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What measured modules come to: norm of all changes as one vector, ranks and those that contribute nothing."""
    ranks = sum(row["rank"] * row["experts"] for row in rows)
    return {
        "norm": math.sqrt(math.fsum(row["norm"] ** 2 for row in rows)),
        "ranks": ranks,
        "effective_ranks": math.fsum(row["effective_rank"] * row["experts"] for row in rows),
        "dead_ranks": sum(row["dead_ranks"] for row in rows),
    }
