"""How a family's experts and router lie on disk, as regions of stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.region import Region

Kind = Literal["per-expert", "fused"]

PROJECTIONS = ("gate", "up", "down")
"""The three matrices of a SwiGLU feed-forward: gate and up are [F, D], down is [D, F]."""

BIASES = ("gate_bias", "up_bias", "down_bias")
"""What is added after each of them, where a family has it: gate and up are [F], down is [D]."""


@dataclass(frozen=True)
class ExpertLayout:
    """One way of storing routed experts.

    Attributes:
        kind: ``per-expert`` (three tensors an expert) or ``fused`` (two tensors a layer: gate rows above up
            rows as [E, 2F, D], down as [E, D, F]: what transformers 5 holds in memory).
        router: name of the router weight [E, D], below the layer's prefix.
        names: per-expert: ``gate``, ``up``, ``down`` with ``{expert}``; fused: ``gate_up``, ``down``, and where
            experts have biases ``gate_up_bias`` [E, 2F] and ``down_bias`` [E, D].
        router_bias: name of what is added to the logits, [E]; empty where there is none.
        correction: name of what is added to the scores for the selection alone, [E]; empty where there is none.
        correction_rank: 2 where that is stored as [1, E].
        transposed: fused matrices are stored [E, D, 2F] and [E, F, D].
        interleaved: gate and up alternate (g, u, g, u, ...) instead of being two halves.
        call: of a layout whose names are a stock layer's, how the block calls its experts: ``routed``: a module of
            theirs is given tokens, indices and weights; ``sorted``: two products over tokens sorted by expert
            (JetMoE); ``scaled``: every expert is given every token times its weight (Llama 4).
    """

    kind: Kind
    router: str
    names: Mapping[str, str]
    router_bias: str = ""
    correction: str = ""
    correction_rank: int = 1
    transposed: bool = False
    interleaved: bool = False
    call: Literal["routed", "sorted", "scaled"] = "routed"

    @property
    def parts(self) -> tuple[str, ...]:
        """What an expert consists of."""
        return (*PROJECTIONS, *BIASES) if "down_bias" in self.names else PROJECTIONS

    @property
    def modules(self) -> tuple[str, str]:
        """Names of the router's and the experts' module, of a layout whose names are a stock layer's."""
        return self.router.rpartition(".")[0], self.names["down"].rpartition(".")[0]

    def routing_shapes(self, experts: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shape of the tensors that decide the routing, the router's weight first."""
        found: dict[str, tuple[int, ...]] = {self.router: (experts, hidden)}
        if self.router_bias:
            found[self.router_bias] = (experts,)
        if self.correction:
            found[self.correction] = (experts,) if self.correction_rank == 1 else (1, experts)
        return found

    def shapes(self, experts: int, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of one layer's mixture, by name below the prefix, in file order."""
        found = self.routing_shapes(experts, hidden)
        if self.kind == "fused":
            gate_up, down = (2 * width, hidden), (hidden, width)
            if self.transposed:
                gate_up, down = gate_up[::-1], down[::-1]
            found[self.names["gate_up"]] = (experts, *gate_up)
            if "gate_up_bias" in self.names:
                found[self.names["gate_up_bias"]] = (experts, 2 * width)
            found[self.names["down"]] = (experts, *down)
            if "down_bias" in self.names:
                found[self.names["down_bias"]] = (experts, hidden)
            return found
        for expert in range(experts):
            for projection in ("gate", "up"):
                found[self.names[projection].format(expert=expert)] = (width, hidden)
            found[self.names["down"].format(expert=expert)] = (hidden, width)
        return found

    def region(self, prefix: str, expert: int, part: str, hidden: int, width: int) -> Region:
        """Where one expert's projection or bias lies; the shape is always [out, in] or [out]."""
        outputs, inputs = (hidden, width) if part.startswith("down") else (width, hidden)
        if self.kind == "per-expert":
            return Region(prefix + self.names[part].format(expert=expert), (outputs, inputs))
        begin = expert * outputs
        if part in ("down", "down_bias"):
            rows, step = outputs, 1
        else:  # gate and up share a tensor
            rows, step = 2 * width, 2 if self.interleaved else 1
            begin *= 2
            if part.startswith("up"):
                begin += 1 if self.interleaved else width
        if part in BIASES:
            name = self.names["down_bias" if part == "down_bias" else "gate_up_bias"]
            return Region(prefix + name, (outputs,), begin, (step,))
        name = prefix + self.names["down" if part == "down" else "gate_up"]
        if not self.transposed:
            return Region(name, (outputs, inputs), begin * inputs, (step * inputs, 1))
        first = expert * rows * inputs + begin - expert * rows
        return Region(name, (outputs, inputs), first, (step, rows))


def fused(
    router: str = "mlp.gate.weight",
    experts: str = "mlp.experts",
    *,
    router_bias: str = "",
    correction: str = "",
    correction_rank: int = 1,
) -> ExpertLayout:
    """Two tensors a layer under transformers 5's usual leaves."""
    names = {"gate_up": f"{experts}.gate_up_proj", "down": f"{experts}.down_proj"}
    return ExpertLayout("fused", router, names, router_bias, correction, correction_rank)


def per_expert(
    router: str = "mlp.gate.weight",
    experts: str = "mlp.experts",
    *,
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    correction: str = "",
    correction_rank: int = 1,
) -> ExpertLayout:
    """Three tensors an expert; ``leaves`` name gate, up and down."""
    names = {
        projection: f"{experts}.{{expert}}.{leaf}.weight"
        for projection, leaf in zip(PROJECTIONS, leaves, strict=True)
    }
    return ExpertLayout("per-expert", router, names, "", correction, correction_rank)


FUSED = fused()
"""The names transformers 5 holds in memory for most families."""

PER_EXPERT = per_expert()
"""The Hub's names for most families."""
