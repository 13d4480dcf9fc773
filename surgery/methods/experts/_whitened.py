"""What the experts of a layer are given on sampled inputs, to weigh directions of their weights by what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._function import activation, gates, hidden

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ...architectures.model import Experts
    from ...execute import Work
    from ._function import Activation

DAMPING = 1e-4
"""Of the mean diagonal of C, added to its diagonal, so that every S is invertible."""


@dataclass(frozen=True)
class Given:
    """A layer's sampled inputs and where they go.

    Attributes:
        rows_ND: inputs, float32.
        gates_NE: the router's coefficients, 0 where an expert is not selected.
        act: the gate's activation.
    """

    rows_ND: torch.Tensor
    gates_NE: torch.Tensor
    act: Activation

    @staticmethod
    def of(work: Work, experts: Experts) -> Given:
        """Those that the run's statistics hold of the unit's layer."""
        rows_ND = work.inputs()
        routing = [work.read(part) for part in experts.routing]
        return Given(rows_ND, gates(work.model, rows_ND, routing), activation(work.model))

    def gram(
        self, expert: int, matrices: Mapping[str, torch.Tensor], projection: str
    ) -> torch.Tensor:
        """(W S)(W S)^T = W C W^T [out, out], float64, with S S^T = C = X^T X + damping.

        X are what the projection is given by the tokens that select the expert, the inputs for gate and up and the
        activations for down. An expert that no sampled token selects has the damping alone, of all tokens.
        """
        token_M = self.gates_NE[:, expert].nonzero().flatten()
        rows = self.rows_ND[token_M] if len(token_M) else self.rows_ND
        if projection == "down":
            rows = hidden(rows, matrices["gate"], matrices["up"], self.act)
        wide, inputs = matrices[projection].double(), rows.double()
        damping = DAMPING * float(inputs.square().sum()) / inputs.shape[1]
        found = (wide @ wide.T).mul_(damping)
        if len(token_M):
            outputs = inputs @ wide.T
            found += outputs.T @ outputs
        return found
