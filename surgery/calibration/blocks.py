"""Mixtures whose stock block has no module that is given tokens, indices and weights, recast as blocks that have one.

What observes experts puts itself in that module's place, so that it need not know the families. The recast blocks
compute what the stock blocks compute, with the stock parameters; `tests/oracle/test_calls.py` compares them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..architectures.layouts import ExpertLayout


def recast(module: nn.Module, stock: ExpertLayout) -> tuple[str, str]:
    """Make a materialised decoder layer's mixture call one experts module, and name its router and that module.

    Args:
        module: the decoder layer, changed in place where needed.
        stock: the family's ``MoE.stock``.

    Returns:
        Names of the module whose output is (or begins with) the router's logits [T, E], and of the experts', which
        is called with inputs [T, D], indices [T, K] and weights [T, K].
    """
    if stock.call == "routed":
        return stock.modules
    name = stock.router.split(".")[0]
    kinds: dict[str, type[nn.Module]] = {"sorted": SortedBlock, "scaled": ScaledBlock}
    module.set_submodule(name, kinds[stock.call](module.get_submodule(name)))
    return f"{name}.router", f"{name}.experts"


class Matrices(nn.Module):
    """The matrices of all experts, for what computes with them.

    Args:
        gate_up_EFD: [E, 2 F, D], gate rows above up rows.
        down_EDF: [E, D, F].
    """

    def __init__(self, gate_up_EFD: torch.Tensor, down_EDF: torch.Tensor, act_fn: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = gate_up_EFD, down_EDF, act_fn


class SortedBlock(nn.Module):
    """JetMoE's feed-forward mixture."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.router, self.top_k, self.bias = stock.router.layer, stock.router.top_k, stock.bias
        self.experts: nn.Module = Matrices(
            stock.input_linear.weight, stock.output_linear.weight, stock.activation
        )

    def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
        input_TD = input_BTD.reshape(-1, input_BTD.shape[-1])
        logits_TK, index_TK = self.router(input_TD).float().topk(self.top_k, dim=1)
        weight_TK = torch.softmax(logits_TK, dim=1).type_as(input_TD)
        mixed_TD: torch.Tensor = self.experts(input_TD, index_TK, weight_TK)
        bias_D: torch.Tensor = self.bias
        return mixed_TD.view(input_BTD.shape) + bias_D


class _Logits(nn.Module):
    """Llama 4's router without what it makes of its logits."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.weight = stock.weight

    def forward(self, input_TD: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input_TD, self.weight)


class ScaledBlock(nn.Module):
    """Llama 4's mixture; its experts module has to multiply inputs, not outputs, by the weights."""

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.router, self.top_k = _Logits(stock.router), stock.router.top_k
        self.shared_expert = stock.shared_expert
        self.experts: nn.Module = Matrices(
            stock.experts.gate_up_proj.transpose(1, 2),
            stock.experts.down_proj.transpose(1, 2),
            stock.experts.act_fn,
        )

    def forward(self, input_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        input_TD = input_BTD.reshape(-1, input_BTD.shape[-1])
        logits_TE = self.router(input_TD)
        top_TK, index_TK = torch.topk(logits_TE, self.top_k, dim=1)
        weight_TK = top_TK.float().sigmoid().to(logits_TE.dtype)
        mixed_TD = self.experts(input_TD, index_TK, weight_TK)
        return self.shared_expert(input_TD) + mixed_TD, logits_TE
