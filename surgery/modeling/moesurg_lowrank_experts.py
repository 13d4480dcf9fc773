"""Experts stored as one base and a change of low rank each. Part of the model code of moesurg.

    W_e = W_base + B_e A_e        for gate, up and down

What the base does to a token is computed once, whatever number of experts it selects: the base's gate and up
projections before any expert, its down projection after their hidden neurons are summed with their weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEY = "moesurg_lowrank_experts"
FULL = -1
"""In the place of a rank: an expert that is stored whole."""


class FeedForward(nn.Module):
    """The three matrices of a SwiGLU feed-forward."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)


class Change(nn.Module):
    """Their changes, A [rank, in] and B [out, rank] each."""

    def __init__(self, hidden: int, width: int, rank: int) -> None:
        super().__init__()
        self.gate_proj_a = nn.Linear(hidden, rank, bias=False)
        self.gate_proj_b = nn.Linear(rank, width, bias=False)
        self.up_proj_a = nn.Linear(hidden, rank, bias=False)
        self.up_proj_b = nn.Linear(rank, width, bias=False)
        self.down_proj_a = nn.Linear(width, rank, bias=False)
        self.down_proj_b = nn.Linear(rank, hidden, bias=False)


class LowRankExperts(nn.Module):
    """The experts of a layer; called as the stock ones are."""

    def __init__(self, hidden: int, width: int, ranks: list[int], act_fn: Any) -> None:
        super().__init__()
        self.num_experts, self.ranks, self.act_fn = len(ranks), ranks, act_fn
        self.base = FeedForward(hidden, width)
        for expert, rank in enumerate(ranks):
            if rank == FULL:
                self.add_module(str(expert), FeedForward(hidden, width))
            elif rank:
                self.add_module(str(expert), Change(hidden, width, rank))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts: states [T, D], indices and weights [T, K]."""
        states_TD = hidden_states
        gates_TF, ups_TF = self.base.gate_proj(states_TD), self.base.up_proj(states_TD)
        summed_TF, output_TD = torch.zeros_like(gates_TF), torch.zeros_like(states_TD)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            weight = top_k_weights[token, slot, None].to(states_TD.dtype)
            state, rank = states_TD[token], self.ranks[expert]
            own: Any = self.get_submodule(str(expert)) if rank else None
            if rank == FULL:
                hidden = self.act_fn(own.gate_proj(state)) * own.up_proj(state) * weight
                output_TD.index_add_(0, token, own.down_proj(hidden))
                continue
            gate, up = gates_TF[token], ups_TF[token]
            if rank:
                gate = gate + own.gate_proj_b(own.gate_proj_a(state))
                up = up + own.up_proj_b(own.up_proj_a(state))
            hidden = self.act_fn(gate) * up * weight
            summed_TF.index_add_(0, token, hidden)
            if rank:
                output_TD.index_add_(0, token, own.down_proj_b(own.down_proj_a(hidden)))
        total: torch.Tensor = output_TD + self.base.down_proj(summed_TF)
        return total


def apply(body: Any, config: Any) -> None:
    """Put experts of low rank in the place of the listed layers' experts.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_lowrank_experts`` has ``experts``: the name of the experts' module below a layer, and
            ``ranks``: by layer the rank of every expert, 0 for the base itself and -1 for one stored whole.

    Raises:
        ValueError: another number of experts than the router has.
    """
    entry = getattr(config, KEY)
    place, _, leaf = entry["experts"].rpartition(".")
    for index, ranks in entry["ranks"].items():
        owner: Any = body.layers[int(index)].get_submodule(place)
        old: Any = getattr(owner, leaf)
        experts, hidden, width = old.down_proj.shape
        if len(ranks) != experts or min(ranks) < FULL:
            raise ValueError(f"config.json: layer {index} has {experts} experts, not {len(ranks)}")
        setattr(owner, leaf, LowRankExperts(hidden, width, list(ranks), old.act_fn))
