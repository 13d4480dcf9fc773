"""What a reversible pack of adapters holds of each module: shapes, types, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...adapters.output import Written, config, widest
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter, Module
    from .rmm import Options


def part(
    adapters: Sequence[Adapter], name: str, held: Sequence[tuple[int, Module]], options: Options
) -> dict[str, Any]:
    """What the pack has to know of a module."""
    ranks = {module.rank for _, module in held}
    if len(ranks) > 1 and not options.pad:
        raise InputError(
            f"module {name} has the ranks {', '.join(map(str, sorted(ranks)))} in different adapters",
            hint="--pad fills the smaller ones up",
        )
    first = held[0][1]
    types = [
        adapters[index].checkpoint.tensors[region.tensor].dtype
        for index, module in held
        for region in (module.down, module.up)
    ]
    rank, tasks = max(ranks), len(held)
    limit = tasks - 1 if options.form == "global" else min(tasks - 1, rank)
    wide = widest([*types, "F32"])
    own = [widest(types[2 * i : 2 * i + 2]) for i in range(tasks)]
    exact = {"dtype": wide, "types": own} if options.exact_factors else {}
    return {
        "kind": first.kind,
        "experts": first.experts,
        "inputs": first.inputs,
        "outputs": first.outputs,
        "down": [first.down.tensor, list(first.down.shape[1:])],
        "up": [first.up.tensor, list(first.up.shape[2:])],
        "rank": rank,
        "basis": min(options.basis, limit),
        "form": options.form,
        "dtype": widest(types),
        "tasks": [index for index, _ in held],
        **exact,
    }


def shapes(part: dict[str, Any], directions: int) -> dict[str, tuple[int, ...]]:
    """Of each tensor of a module with a number of directions."""
    places = part["experts"] * (part["inputs"] + part["outputs"])
    found: dict[str, tuple[int, ...]] = {"mean": (places, part["rank"])}
    if directions:
        tasks = len(part["tasks"])
        found["basis"] = (places, part["rank"], directions)
        shared = part["form"] == "global"
        found["coefficients"] = (directions, tasks) if shared else (places, directions, tasks)
    if "types" in part:
        found["turns"] = (len(part["tasks"]), part["experts"], part["rank"], part["rank"])
    return found


def tensors(name: str, part: dict[str, Any]) -> list[TensorSpec]:
    """What the pack stores of a module."""
    return [
        TensorSpec(f"{name}.{key}", part["dtype"], shape)
        for key, shape in shapes(part, part["basis"]).items()
    ]


def size(part: dict[str, Any], directions: int) -> int:
    """Elements of a module with a number of directions."""
    return sum(Region("", shape).count for shape in shapes(part, directions).values())


def folded_config(adapter: Adapter) -> dict[str, object]:
    """The config of the adapter as it will be taken out: scales are in the factors."""
    return config(
        [adapter], [Written(module, module.rank, "") for module in adapter.modules.values()]
    )


def check_plain(adapter: Adapter) -> None:
    """Refuse what is not made of two factors."""
    biased = next((m.name for m in adapter.modules.values() if m.bias is not None), None)
    if biased is not None:
        raise InputError(
            f"{adapter.folder}: module {biased} has lora_B.bias, which a basis cannot hold"
        )
    if adapter.full:
        raise InputError(
            f"{adapter.folder}: holds {', '.join(sorted(adapter.full))} in full, which a basis cannot hold",
            hint="take modules_to_save out of the adapter",
        )
