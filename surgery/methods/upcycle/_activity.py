"""What a dense feed-forward's neurons do on sampled inputs, and experts and routers made from that.

N counts sampled tokens, I neurons, D the model width, E experts. Activations are computed in blocks of tokens, so
that memory is that of a layer's weights, its sample, and one mark (a byte, and four where marks are multiplied) per
token and neuron.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ...execute import Work

BLOCK = 512
"""Tokens whose activations are held at a time."""
HELD_OUT = 4
"""Every so many-th sampled token is kept from the fit of a router and measures it."""


@dataclass(frozen=True)
class Neurons:
    """A feed-forward and sampled inputs of it.

    Attributes:
        inputs_ND: float32.
        gate_ID, up_ID, down_ID: float32, down transposed: a row of each belongs to one neuron.
        act: the gate's activation.
    """

    inputs_ND: torch.Tensor
    gate_ID: torch.Tensor
    up_ID: torch.Tensor
    down_ID: torch.Tensor
    act: Any

    @classmethod
    def of(cls, work: Work, rows: Sequence[torch.Tensor]) -> Neurons:
        """Those of a unit's layer, whose matrices ``rows`` (gate, up and transposed down) are read already."""
        import torch

        from ...calibration.means import Means
        from ..experts._function import activation

        inputs_ND = torch.cat(Means.open(work.statistics).samples(work.layer))
        gate_ID, up_ID, down_ID = (matrix.float() for matrix in rows)
        return cls(inputs_ND, gate_ID, up_ID, down_ID, activation(work.model))

    def contributions(self) -> Iterator[torch.Tensor]:
        """|act(g x) (u x)| |d| in blocks [n, I]: the length of what every neuron adds to the output."""
        length_I = self.down_ID.norm(dim=1)
        for x_nD in self._blocks():
            yield self._activations(x_nD, self.gate_ID, self.up_ID).abs_().mul_(length_I)

    def normalised(self) -> Iterator[torch.Tensor]:
        """CMoE's activations in blocks [n, I]: of inputs and rows of gate and up that all have length one."""
        gate_ID, up_ID = _unit(self.gate_ID), _unit(self.up_ID)
        for x_nD in self._blocks():
            yield self._activations(_unit(x_nD), gate_ID, up_ID)

    def oracle(self, members_EN: NDArray[np.int64]) -> torch.Tensor:
        """The length of every expert's output on every token: float32 [N, E]."""
        import torch

        found = []
        for x_nD in self._blocks():
            active_nI = self._activations(x_nD, self.gate_ID, self.up_ID)
            parts = [
                (active_nI[:, own] @ self.down_ID[own]).norm(dim=1)
                for own in map(torch.from_numpy, members_EN)
            ]
            found.append(torch.stack(parts, dim=1))
        return torch.cat(found)

    def analytic(self, representatives: Sequence[int]) -> torch.Tensor:
        """CMoE's router: |act(g x) (u x)| of one neuron per expert, rows of length one: float32 [N, E].

        Its softmax is left out, which does not change their order.
        """
        chosen = list(representatives)
        gate_ED, up_ED = _unit(self.gate_ID[chosen]), _unit(self.up_ID[chosen])
        return self._activations(self.inputs_ND, gate_ED, up_ED).abs_()

    def _blocks(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.inputs_ND), BLOCK):
            yield self.inputs_ND[start : start + BLOCK]

    def _activations(
        self, x_nD: torch.Tensor, gate_ID: torch.Tensor, up_ID: torch.Tensor
    ) -> torch.Tensor:
        found_nI: torch.Tensor = self.act(x_nD @ gate_ID.T)
        return found_nI * (x_nD @ up_ID.T)


def active(neurons: Neurons, by: str, count: int) -> torch.Tensor:
    """Each token's ``count`` most active neurons: bool [N, I].

    By CMoE's normalised activations, or by what neurons add to the output.
    """
    import torch

    from ...linalg.coactivation import marks

    blocks = neurons.normalised() if by == "cmoe" else neurons.contributions()
    return torch.cat([marks(block_nI, count) for block_nI in blocks])


def router(
    neurons: Neurons,
    members_EN: NDArray[np.int64],
    representatives: Sequence[int],
    top_k: int,
    *,
    target: str,
    ridge: float,
    sharpness: float,
) -> tuple[torch.Tensor, dict[str, object]]:
    """A stock router fitted to the choices of CMoE's (``analytic``) or to the largest outputs (``oracle``).

    Three of four sampled tokens are fitted, the others measure. Rows are scaled so that logits, less their mean over
    experts, have root mean square ``sharpness`` on the fitted tokens.

    Returns:
        Float64 rows [E, D], and shares of tokens' k experts that agree, on tokens not fitted.
    """
    import torch

    from ...linalg.linear_router import chosen, fit_router, recall

    analytic_NE, oracle_NE = neurons.analytic(representatives), neurons.oracle(members_EN)
    wanted_NE = analytic_NE if target == "analytic" else oracle_NE
    held_N = torch.arange(len(wanted_NE)) % HELD_OUT == HELD_OUT - 1
    fit_N = ~held_N if bool(held_N.any()) else torch.ones_like(held_N)
    rows_ED = fit_router(neurons.inputs_ND[fit_N], wanted_NE[fit_N], top_k, ridge=ridge)
    logits_NE = neurons.inputs_ND.double() @ rows_ED.T
    size = float(logits_NE[fit_N].square().mean().sqrt())
    metrics: dict[str, object] = {"tokens": len(logits_NE)}
    if bool(held_N.any()):
        stock_NE, analytic_NE, oracle_NE = (
            scores_NE[held_N] for scores_NE in (logits_NE, analytic_NE, oracle_NE)
        )
        load_E = chosen(stock_NE, top_k).double().mean(dim=0)
        metrics |= {
            "recall_of_analytic": round(recall(stock_NE, analytic_NE, top_k), 4),
            "recall_of_oracle": round(recall(stock_NE, oracle_NE, top_k), 4),
            "analytic_recall_of_oracle": round(recall(analytic_NE, oracle_NE, top_k), 4),
            "recall_by_chance": round(top_k / len(rows_ED), 4),
            "largest_load": round(float(load_E.max()), 4),
        }
    return (rows_ED * (sharpness / size) if size else rows_ED), metrics


def _unit(rows: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return found
