"""Which experts stay: the counting rules every pruning method shares. Needs no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics

SUPER_PERCENTILE = 99.5
SUPER_SHARE = 0.1
SUPER_DEPTH = 0.75


@dataclass(frozen=True)
class Groups:
    """The contiguous groups a group-limited router selects from.

    Attributes:
        count: groups of experts; 1 for a router without groups.
        selected: groups a token may select from.
    """

    count: int = 1
    selected: int = 1


def groups_of(model: Model) -> Groups:
    """The groups of a model's router."""
    return Groups(model.rule.groups, model.rule.top_groups)


def check_counts(
    experts: int, keep: int, top_k: int, groups: Groups = Groups(), *, where: str = "the model"
) -> None:
    """Refuse counts no router can work with, before anything is calibrated.

    Every group keeps the same number, at least two where there are groups (a group's score is the sum of its
    two best), and the groups a token may select from hold at least ``top_k``.

    Raises:
        InputError: naming the rule.
    """
    if not 1 <= keep <= experts:
        raise InputError(f"{where}: --experts {keep} asked for, the model has {experts} per layer")
    if keep < top_k:
        raise InputError(
            f"{where}: --experts {keep} is fewer than the {top_k} experts each token selects",
            hint=f"use --experts {top_k} or more",
        )
    if groups.count == 1:
        return
    if experts % groups.count or keep % groups.count:
        raise InputError(
            f"{where}: --experts {keep} cannot be kept evenly in the {groups.count} groups of the "
            "router",
            hint=f"use a multiple of {groups.count}",
        )
    each = keep // groups.count
    if each < 2 or each * groups.selected < top_k:
        least = groups.count * max(2, math.ceil(top_k / groups.selected))
        raise InputError(
            f"{where}: --experts {keep} leaves {each} in each of {groups.count} groups, of which a token "
            f"selects {top_k} experts from {groups.selected}",
            hint=f"use --experts {least} or more",
        )


def members(experts: int, groups: int) -> list[range]:
    """The experts of each group."""
    size = experts // groups
    return [range(group * size, (group + 1) * size) for group in range(groups)]


def candidates(
    experts: int,
    keep: int,
    *,
    groups: int = 1,
    forced: Collection[int] = (),
    where: str = "a layer",
) -> list[tuple[list[int], int]]:
    """For each group the experts that may be dropped, ascending, and how many of them must be.

    Raises:
        InputError: more experts are forced to stay than a group keeps.
    """
    found = []
    for group in members(experts, groups):
        free = [expert for expert in group if expert not in forced]
        drop = len(group) - keep // groups
        if drop > len(free):
            raise InputError(
                f"{where}: {len(group) - len(free)} experts must stay "
                f"({', '.join(str(expert) for expert in group if expert in forced)}), "
                f"and only {len(group) - drop} are kept",
                hint="keep more --experts, or protect fewer",
            )
        found.append((free, drop))
    return found


def keep_list(
    scores: Sequence[float],
    keep: int,
    *,
    groups: int = 1,
    forced: Collection[int] = (),
    where: str = "a layer",
) -> list[int]:
    """The experts to keep, ascending: those with the lowest scores go, of equal ones the first.

    Args:
        scores: of every expert; -infinity goes before all others.
        keep: experts to keep, the same number in each of ``groups`` contiguous groups.
        forced: experts that stay whatever their score.
        where: names the layer in errors.

    Raises:
        InputError: a score is no number, or more are forced than kept.
    """
    for expert, score in enumerate(scores):
        if math.isnan(score):
            raise InputError(f"{where}, expert {expert}: its score is not a number")
    dropped: set[int] = set()
    for free, drop in candidates(len(scores), keep, groups=groups, forced=forced, where=where):
        dropped.update(sorted(free, key=lambda expert: (scores[expert], expert))[:drop])
    return [expert for expert in range(len(scores)) if expert not in dropped]


def count_subsets(choices: Sequence[tuple[Sequence[int], int]]) -> int:
    """How many sets :func:`subsets` gives."""
    return math.prod(math.comb(len(free), drop) for free, drop in choices)


def subsets(choices: Sequence[tuple[Sequence[int], int]]) -> Iterator[tuple[int, ...]]:
    """Every way to take the asked-for number from each group's candidates, in lexicographic order."""
    parts = [itertools.combinations(free, drop) for free, drop in choices]
    for chosen in itertools.product(*parts):
        yield tuple(itertools.chain.from_iterable(chosen))


def super_experts(model: Model, statistics: Statistics) -> dict[int, list[int]]:
    """Experts whose outputs hold extreme values, by layer (Super Experts, arXiv:2507.23279).

    Those whose largest |element of the output| exceeds both the 99.5th percentile (linear interpolation) over
    all experts of the model and a tenth of the largest, in the first three quarters of the decoder layers.
    """
    import numpy as np

    largest = {layer: statistics.layer(layer).max_abs_E for layer in statistics.layers}
    everyone = np.concatenate(list(largest.values()))
    threshold = max(
        float(np.percentile(everyone, SUPER_PERCENTILE)), SUPER_SHARE * float(everyone.max())
    )
    return {
        layer: [int(expert) for expert in np.flatnonzero(found > threshold)]
        if layer < SUPER_DEPTH * len(model.layers)
        else []
        for layer, found in largest.items()
    }
