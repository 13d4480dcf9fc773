"""The rank of every module of a merge: chosen, or what keeps a share of the energy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ...adapters.output import aligned, layout_of, placed
from ...errors import UsageError
from ._merge import Chosen, parse_weights, weights_in

if TYPE_CHECKING:
    from ...adapters.adapter import Module
    from ...linalg.factors import Factors
    from ...weights import Weights

RANK_HELP = "rank of every module; by default the largest that an adapter has there"
SUM_HELP = "rank of every module; by default the sum of the ranks"
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
        most = _most(modules)
        if decided is not None:
            return min(most, decided[modules[0].name])
        if energy is not None:
            return most
        return min(most, rank) if rank is not None else min(most, max(m.rank for m in modules))

    return found


def sum_rank(rank: int | None) -> Callable[[list[Module]], int]:
    """The sum of a module's ranks, or the rank that the user chose.

    Raises:
        UsageError: below 1.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} should be at least 1")

    def found(modules: list[Module]) -> int:
        first = modules[0]
        most = min(first.inputs, first.outputs)
        return min(most, sum(module.rank for module in modules) if rank is None else rank)

    return found


def _most(modules: list[Module]) -> int:
    first = modules[0]
    return min(first.inputs, first.outputs, sum(module.rank for module in modules))


def decide_ranks(weights: Weights, options: Chosen, energy: float) -> dict[str, dict[str, int]]:
    """The rank of every module that keeps a share of the weighted sum's energy; at least 1."""
    import torch

    from ...linalg.factors import core

    ranks: dict[str, int] = {}
    for name, factors, scales in track_factors(weights, options):
        down = torch.cat([down for down, _ in factors], dim=1)
        up = torch.cat([up * scale for (_, up), scale in zip(factors, scales, strict=True)], dim=2)
        squares = torch.linalg.svdvals(core((down, up))).square()
        share = squares.cumsum(-1) / squares.sum(-1, keepdim=True).clamp_min(1e-300)
        needed = (share < energy - 1e-12).sum(-1) + 1
        ranks[name] = int(needed.clamp_max(squares.shape[-1]).max())
    return {"None": ranks}


def track_factors(
    weights: Weights, options: Chosen
) -> Iterator[tuple[str, list[Factors], Sequence[float]]]:
    """Every module's factors A [E, r, n] and B [E, m, r] with their scale in B, and their weights, for decisions."""
    from ...adapters import packing

    adapters = weights.sources
    scales = parse_weights(options.weights, len(adapters))
    layouts = [layout_of(adapter, options.expert_layout) for adapter in adapters]
    for name, row in weights.track(list(aligned(adapters).items())):
        found = weights_in(name, row, scales, options.missing)
        factors, kept = [], []
        for index, module in enumerate(row):
            if module is None:
                continue
            down = weights.read(placed(module.down, index)).double()
            up = weights.read(placed(module.up, index)).double() * module.scale
            factors.append(
                (
                    packing.unpack_down(down, module.experts),
                    packing.unpack_up(up, module.experts, layouts[index]),
                )
            )
            kept.append(found[index])
        yield name, factors, kept
