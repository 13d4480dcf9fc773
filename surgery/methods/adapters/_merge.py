"""What all ways of merging adapters share: weights, alignment of modules, the planned output, the unit's metrics.

A unit is one module. Every method gets the modules' factors with scales folded in and float64, and gives back factors
of the planned rank. Modules that only some adapters have count as zero in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ...adapters.output import Written, aligned, check_agreement, config, read_factors, widest
from ...adapters.packing import LAYOUTS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, option

if TYPE_CHECKING:
    import torch

    from ...adapters.adapter import Adapter, Module
    from ...execute import Work
    from ...weights import Weights


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What the user chooses for every method that merges adapters."""

    weights: str | None = option(
        None, "comma-separated weight of each adapter; by default 1 each", metavar="W,W,..."
    )
    expert_layout: str | None = option(
        None,
        "how stacked experts' second factors are stored; needed where it cannot be told",
        choices=LAYOUTS,
    )


RANK_HELP = "rank of every module; by default the largest that an adapter has there"
ENERGY_HELP = (
    "instead of --rank: the smallest rank of each module that keeps this share of the squared singular values of the "
    "sum (0.99)"
)


def chosen_rank(
    rank: int | None, energy: float | None, decided: Mapping[str, int] | None = None
) -> Callable[[list[Module]], int]:
    """The rank of a module from options.

    Args:
        rank: of every module, or None for the largest that an adapter has of it.
        energy: the share of energy to keep; until it is known what it takes, the sum of the ranks is planned.
        decided: ranks by module, once they are known.

    Raises:
        UsageError: an option out of range, or both.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} should be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy} should be above 0 and at most 1")
    if energy is not None and rank is not None:
        raise UsageError("--rank and --energy exclude each other")

    def found(modules: list[Module]) -> int:
        first = modules[0]
        most = min(first.inputs, first.outputs, sum(module.rank for module in modules))
        if decided is not None:
            return min(most, decided[first.name])
        if energy is not None:
            return most
        return min(most, rank) if rank is not None else min(most, max(m.rank for m in modules))

    return found


def decide_ranks(
    adapters: Sequence[Adapter], options: Any, weights: Any
) -> dict[str, dict[str, int]]:
    """The rank of every module that keeps the wanted share of the weighted sum's energy; at least 1."""
    import torch

    from ...linalg.factors import core

    scales = parse_weights(options.weights, len(adapters))
    ranks: dict[str, int] = {}
    for name, factors in track_factors(weights, options, scales):
        energy = torch.linalg.svdvals(core(concatenated(factors, [1.0] * len(factors)))).square()
        share = energy.cumsum(-1) / energy.sum(-1, keepdim=True).clamp_min(1e-300)
        needed = (share < options.energy - 1e-12).sum(-1) + 1
        ranks[name] = int(needed.clamp_max(energy.shape[-1]).max())
    return {"None": ranks}


def track_factors(
    weights: Weights, options: Any, scales: Sequence[float] | None = None
) -> Iterator[tuple[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """Every module's factors A [E, r, n] and B [E, m, r] while a method decides; scale and weight are in B."""
    from ...adapters import packing

    adapters = weights.sources
    for name, row in weights.track(list(aligned(adapters).items())):
        factors = []
        for index, module in enumerate(row):
            if module is None:
                continue
            down = weights.read(placed(module.down, index)).double()
            up = weights.read(placed(module.up, index)).double()
            layout = layout_of(adapters[index], options.expert_layout)
            factor = module.scale * (1.0 if scales is None else scales[index])
            factors.append(
                (
                    packing.unpack_down(down, module.experts),
                    packing.unpack_up(up, module.experts, layout) * factor,
                )
            )
        yield name, factors


def parse_weights(text: str | None, count: int, default: float = 1.0) -> list[float]:
    """The weight of each adapter.

    Raises:
        UsageError: not numbers, or not one an adapter.
    """
    if text is None:
        return [default] * count
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text!r} should be numbers separated by commas") from None
    if len(found) != count:
        raise UsageError(f"--weights gives {len(found)} numbers for {count} sources")
    if not all(abs(value) < float("inf") for value in found):
        raise UsageError(f"--weights {text!r} should be finite")
    return found


def plan_merge(
    adapters: Sequence[Adapter],
    options: MergeOptions,
    *,
    rank: Callable[[list[Module]], int],
    params: Mapping[str, Any],
    exactness: Exactness,
    memory: int = 6,
    default_weight: float = 1.0,
    notes: Sequence[str] = (),
) -> Draft:
    """One unit for every module.

    Args:
        adapters: the sources.
        rank: the output's rank of a module from those that the adapters hold of it.
        params: what the transform needs to know, the same for every unit.
        memory: how many copies of all its factors in float64 a unit holds.
        default_weight: of an adapter whose weight the user does not choose.

    Raises:
        InputError: the adapters do not belong together.
        UsageError: weights that do not fit.
    """
    check_agreement(adapters)
    weights = parse_weights(options.weights, len(adapters), default_weight)
    layouts = [layout_of(adapter, options.expert_layout) for adapter in adapters]
    written: list[Written] = []
    units: list[Unit] = []
    for name, row in aligned(adapters).items():
        present = [module for module in row if module is not None]
        chosen = rank(present)
        if chosen < 1:
            raise UsageError(
                f"module {name} would have the rank {chosen}, which should be at least 1"
            )
        types = [
            adapters[index].checkpoint.tensors[region.tensor].dtype
            for index, module in enumerate(row)
            if module is not None
            for region in (module.down, module.up)
        ]
        entry = Written(
            present[0], chosen, widest(types), any(module.bias is not None for module in present)
        )
        written.append(entry)
        numbers = sum(module.down.count + module.up.count for module in present)
        numbers += entry.down.count + entry.up.count
        units.append(
            Unit(
                name,
                "transform",
                reads=tuple(
                    placed(region, index)
                    for index, module in enumerate(row)
                    if module is not None
                    for region in _regions(module)
                ),
                writes=entry.regions,
                params={
                    **params,
                    "module": name,
                    "rank": chosen,
                    "weights": weights,
                    "layouts": layouts,
                },
                memory=8 * memory * numbers,
            )
        )
    full, moves = _saved(adapters)
    if moves:
        units.append(copy_unit("saved", moves))
    specs = [spec for entry in written for spec in entry.specs] + full
    saved = [spec.name for spec in full]
    return Draft(
        config(adapters, written, saved),
        specs,
        units,
        exactness,
        notes=_notes(adapters, notes),
        format="adapter",
    )


@dataclass(frozen=True)
class Loaded:
    """What a unit's sources hold of its module.

    Attributes:
        module: of the first adapter that has it.
        factors: A [E, r, n] and B [E, m, r] of each adapter that has it, float64, scales folded in.
        weights: of those adapters.
        biases: scaled bias [m] of each of them, or None.
        sources: their positions.
        count: of all adapters, with or without the module.
    """

    module: Module
    factors: list[tuple[torch.Tensor, torch.Tensor]]
    weights: list[float]
    biases: list[torch.Tensor | None]
    sources: list[int]
    count: int


def load(work: Work) -> Loaded:
    """Read a unit's factors."""
    name, adapters = work.params["module"], work.adapters
    held = [
        (index, adapter.modules[name])
        for index, adapter in enumerate(adapters)
        if name in adapter.modules
    ]
    factors, biases = [], []
    for index, module in held:
        layout = work.params["layouts"][index]
        factors.append(read_factors(work, module, source=index, layout=layout))
        bias = None
        if module.bias is not None:
            bias = work.read(placed(module.bias, index)).double() * module.scale
        biases.append(bias)
    weights = [work.params["weights"][index] for index, _ in held]
    positions = [index for index, _ in held]
    return Loaded(held[0][1], factors, weights, biases, positions, len(adapters))


def save(
    work: Work,
    loaded: Loaded,
    down_ERN: torch.Tensor,
    up_EMR: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> dict[str, object]:
    """Write merged factors, padded with zeros up to the planned rank, and measure them.

    Returns:
        ``error`` and ``stored_error``: the relative Frobenius distance of the change of weight from the weighted sum
        of the sources' changes, before and after the cast; ``effective_rank``; of the sources ``dead_ranks``, which
        contribute nothing, and with several ``cosines``: [position, position, cosine of the angle between their
        changes] of each pair that has the module.
    """
    import torch

    from ...adapters import packing
    from ...checkpoint.dtypes import torch_dtype
    from ...linalg import factors

    plan = Written(loaded.module, work.params["rank"], "", bias is not None)
    experts, rank = down_ERN.shape[:2]
    lacking = plan.rank - rank
    if lacking:
        zeros_down = down_ERN.new_zeros(experts, lacking, down_ERN.shape[2])
        zeros_up = up_EMR.new_zeros(experts, up_EMR.shape[1], lacking)
        down_ERN = torch.cat([down_ERN, zeros_down], dim=1)
        up_EMR = torch.cat([up_EMR, zeros_up], dim=2)
    work.write(plan.down, packing.pack_down(down_ERN, plan.down.shape))
    work.write(plan.up, packing.pack_up(up_EMR, plan.up.shape))
    if bias is not None:
        work.write(plan.bias_region, bias)
    target = concatenated(loaded.factors, loaded.weights)
    kind = torch_dtype(work.dtype(plan.down))
    rounded = (down_ERN.to(kind).double(), up_EMR.to(kind).double())
    error = factors.relative_error((down_ERN, up_EMR), target)
    found: dict[str, object] = {
        "rank": rank,
        "error": error,
        # Where the merge loses nothing, the cast is all there is, and is measured without cancellation.
        "stored_error": factors.relative_error(rounded, target)
        if error > 1e-12
        else factors.rounding_error((down_ERN, up_EMR), rounded),
        "effective_rank": factors.effective_rank(down_ERN, up_EMR),
        "dead_ranks": sum(factors.dead(pair) for pair in loaded.factors),
    }
    if len(loaded.sources) > 1:
        angles = factors.cosines(loaded.factors)
        found["cosines"] = [
            [loaded.sources[i], loaded.sources[j], angles[i][j]]
            for i, j in combinations(range(len(angles)), 2)
        ]
    return found


def merge_each(
    work: Work,
    merged: Callable[[list[tuple[torch.Tensor, torch.Tensor]], list[float]], Any],
    *,
    bias: Callable[[Loaded], torch.Tensor | None] | None = None,
) -> dict[str, object]:
    """Merge every expert of a module (most have one) and write it.

    Args:
        merged: from factors A [r, n] and B [m, r] of each adapter that has the module, and their weights, to merged
            factors of at most the planned rank, or to these and metrics.
        bias: how biases are merged; by default their weighted sum.
    """
    import torch

    loaded = load(work)
    found, metrics = [], []
    for expert in range(loaded.module.experts):
        pairs = [(down[expert], up[expert]) for down, up in loaded.factors]
        result = merged(pairs, loaded.weights)
        pair, measured = result if isinstance(result[1], dict) else (result, {})
        found.append(pair)
        metrics.append(measured)
    rank = max(down.shape[0] for down, _ in found)
    down_ERN = torch.stack([_padded(down, rank, 0) for down, _ in found])
    up_EMR = torch.stack([_padded(up, rank, 1) for _, up in found])
    own = metrics[0] if len(metrics) == 1 else {"experts": metrics} if any(metrics) else {}
    added = (bias or summed_bias)(loaded)
    return {**save(work, loaded, down_ERN, up_EMR, bias=added), **own}


def _padded(factor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """A factor with zeros up to a rank."""
    import torch

    lacking = list(factor.shape)
    lacking[dim] = size - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(lacking)], dim=dim)


def concatenated(
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [E, R, n] and [E, m, R] whose product is the weighted sum of the products; weights go into B."""
    import torch

    down = torch.cat([down_ERN for down_ERN, _ in factors], dim=1)
    up = torch.cat(
        [up_EMR * weight for (_, up_EMR), weight in zip(factors, weights, strict=True)], dim=2
    )
    return down, up


def summed_bias(loaded: Loaded) -> torch.Tensor | None:
    """The weighted sum of the biases, or None where no adapter has one."""
    found = None
    for bias, weight in zip(loaded.biases, loaded.weights, strict=True):
        if bias is not None:
            found = bias * weight if found is None else found + bias * weight
    return found


def _regions(module: Module) -> list[Region]:
    both = [module.down, module.up]
    return both if module.bias is None else [*both, module.bias]


def placed(region: Region, source: int) -> Region:
    """The region in one of several sources."""
    import dataclasses

    return dataclasses.replace(region, source=source)


def layout_of(adapter: Adapter, chosen: str | None) -> str:
    """The layout of an adapter's stacked experts, which only the user can tell where rank and count differ."""
    for module in adapter.modules.values():
        if chosen is None and module.experts > 1 and module.rank > 1:
            raise InputError(
                f"{adapter.folder}: module {module.name} stacks {module.experts} experts of rank {module.rank}, and "
                "the order in its second factor cannot be told from the file",
                hint="--expert-layout peft for adapters that PEFT wrote, unsloth for Unsloth's",
            )
    return chosen or "peft"


def _saved(
    adapters: Sequence[Adapter],
) -> tuple[list[TensorSpec], list[tuple[Region, list[Region]]]]:
    """Tensors that are saved in full, which can be kept only if there is one adapter."""
    holders = [adapter for adapter in adapters if adapter.full]
    if not holders:
        return [], []
    if len(adapters) > 1:
        names = ", ".join(sorted(holders[0].full))
        raise InputError(
            f"{holders[0].folder}: holds {names} in full, which no rule for low-rank factors can merge",
            hint="take modules_to_save out of the adapters, or merge full models",
        )
    specs, moves = [], []
    for _, region in sorted(holders[0].full.items()):
        dtype = holders[0].checkpoint.tensors[region.tensor].dtype
        specs.append(TensorSpec(region.tensor, dtype, region.shape))
        moves.append((region, [region]))
    return specs, moves


def _notes(adapters: Sequence[Adapter], notes: Sequence[str]) -> list[str]:
    found = list(notes)
    names = {name for adapter in adapters for name in adapter.modules}
    partly = sum(any(name not in adapter.modules for adapter in adapters) for name in names)
    if partly:
        found.append(
            f"{partly} of {len(names)} modules are not in every adapter; an adapter without one counts as zero there"
        )
    return found
