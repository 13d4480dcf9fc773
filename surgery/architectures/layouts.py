"""How a family's experts and router lie on disk, as regions of stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.region import Region

Kind = Literal["per-expert", "fused"]


@dataclass(frozen=True)
class ExpertLayout:
    """One way of storing routed experts.

    Attributes:
        kind: ``per-expert`` (three tensors an expert) or ``fused`` (two tensors a layer: gate rows above up
            rows as [E, 2F, D], down as [E, D, F]: what transformers 5 holds in memory).
        router: name of the router weight [E, D], below the layer's prefix.
        names: per-expert: ``gate``, ``up``, ``down`` with ``{expert}``; fused: ``gate_up``, ``down``.
    """

    kind: Kind
    router: str
    names: Mapping[str, str]

    def shapes(self, experts: int, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one layer's mixture, by name below the prefix, in file order."""
        found: dict[str, tuple[int, ...]] = {self.router: (experts, hidden)}
        if self.kind == "fused":
            found[self.names["gate_up"]] = (experts, 2 * width, hidden)
            found[self.names["down"]] = (experts, hidden, width)
            return found
        for expert in range(experts):
            for projection in ("gate", "up"):
                found[self.names[projection].format(expert=expert)] = (width, hidden)
            found[self.names["down"].format(expert=expert)] = (hidden, width)
        return found

    def region(self, prefix: str, expert: int, projection: str, hidden: int, width: int) -> Region:
        """Where one expert's projection lies; the shape is always [out, in]."""
        shape = (hidden, width) if projection == "down" else (width, hidden)
        if self.kind == "per-expert":
            return Region(prefix + self.names[projection].format(expert=expert), shape)
        if projection == "down":
            return Region(prefix + self.names["down"], shape, expert * hidden * width)
        first_row = 2 * width * expert + (width if projection == "up" else 0)
        return Region(prefix + self.names["gate_up"], shape, first_row * hidden)


FUSED = ExpertLayout(
    "fused",
    "mlp.gate.weight",
    {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"},
)
"""The names transformers 5 holds in memory, the same for every family so far."""

PER_EXPERT = ExpertLayout(
    "per-expert",
    "mlp.gate.weight",
    {
        "gate": "mlp.experts.{expert}.gate_proj.weight",
        "up": "mlp.experts.{expert}.up_proj.weight",
        "down": "mlp.experts.{expert}.down_proj.weight",
    },
)
"""The Hub's names for most families."""
