"""Which experts become one: the decision every merging method makes, checked and JSON-ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import MoesurgError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Grouping:
    """The groups of one layer.

    Attributes:
        groups: members of each group; every expert in exactly one. Ordered by representative.
        representatives: for each group the member whose router row and slot it keeps.
        weights: for each group its members' share in the average, summing to one.
        details: numbers for the report.
    """

    groups: tuple[tuple[int, ...], ...]
    representatives: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    details: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "groups": [list(group) for group in self.groups],
            "representatives": list(self.representatives),
            "weights": [list(weights) for weights in self.weights],
            **self.details,
        }

    def slot_of(self) -> dict[int, int]:
        """The group index of every expert."""
        return {expert: slot for slot, group in enumerate(self.groups) for expert in group}


def from_labels(
    labels: Sequence[int], usage: Sequence[float], details: dict[str, Any] | None = None
) -> Grouping:
    """Groups from a label per expert; the representative is the most used member, ties to the lowest index.

    Args:
        labels: group label of each expert.
        usage: routing frequency of each expert, the averaging weight.
    """
    found: dict[int, list[int]] = {}
    for expert, label in enumerate(labels):
        found.setdefault(label, []).append(expert)
    representative = {
        label: max(members, key=lambda expert: (usage[expert], -expert))
        for label, members in found.items()
    }
    return from_members(found, representative, usage, details)


def from_members(
    members: dict[int, list[int]],
    representative: dict[int, int],
    usage: Sequence[float],
    details: dict[str, Any] | None = None,
) -> Grouping:
    """Groups with chosen representatives, ordered by them.

    Averaging weights are the members' usage over the group's; a group nobody used is averaged uniformly,
    never divided into zeros.
    """
    order = sorted(members, key=lambda label: representative[label])
    groups = tuple(tuple(sorted(members[label])) for label in order)
    weights = []
    for group in groups:
        total = sum(usage[expert] for expert in group)
        if total > 0:
            weights.append(tuple(float(usage[expert] / total) for expert in group))
        else:
            weights.append(tuple(1.0 / len(group) for _ in group))
    return Grouping(
        groups, tuple(representative[label] for label in order), tuple(weights), details or {}
    )


def reweighted(grouping: Grouping, shares: Sequence[float]) -> Grouping:
    """The same groups and representatives with members weighted by something else."""
    places = dict(enumerate(grouping.groups))
    return from_members(
        {slot: list(group) for slot, group in places.items()},
        dict(enumerate(grouping.representatives)),
        shares,
        grouping.details,
    )


def around(
    centres: Sequence[int], similarity_EE: NDArray[np.float64], usage: Sequence[float]
) -> Grouping:
    """Every other expert joins the most similar centre, ties to the lowest index.

    Args:
        centres: ascending; each is its group's representative.
        similarity_EE: [E, E].
        usage: the averaging weight of each expert.
    """
    members = {centre: [centre] for centre in centres}
    similarity = {}
    for expert in (other for other in range(len(usage)) if other not in members):
        best = max(centres, key=lambda centre: (float(similarity_EE[expert, centre]), -centre))
        members[best].append(expert)
        similarity[str(expert)] = float(similarity_EE[expert, best])
    themselves = {centre: centre for centre in centres}
    return from_members(members, themselves, usage, {"similarity": similarity})


def check(decision: dict[str, Any], experts: int, expected: int | None) -> Grouping:
    """A decision as a Grouping again, with the invariants checked.

    Raises:
        MoesurgError: an expert in no group or two, or another number of groups than planned.
    """
    groups = tuple(tuple(group) for group in decision["groups"])
    seen = sorted(expert for group in groups for expert in group)
    if seen != list(range(experts)):
        raise MoesurgError(f"the grouping {groups} is no partition of {experts} experts")
    if expected is not None and len(groups) != expected:
        raise MoesurgError(f"planned {expected} groups, the grouping has {len(groups)}")
    return Grouping(
        groups,
        tuple(decision["representatives"]),
        tuple(tuple(weights) for weights in decision["weights"]),
        {},
    )
