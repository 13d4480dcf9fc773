"""Attention experts mixed by a router (Branch-Attend-Mix, arXiv:2408.08274). Part of the model code of moesurg.

    MoA(u) = sum_j g_j(u) Attention_j(u),    g = softmax(W u)

The attentions of all N experts are one attention with N times the heads, whose heads' outputs are multiplied by their
expert's gate before the output projection. So the stock class attends, with its own masks, cache and kernels.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

KEY = "moesurg_bam"
ROUTER = "expert_router"
"""The attention experts' router below ``self_attn``: a linear layer [N, D] without bias."""


class GatedOutput(nn.Module):
    """The output projection behind gated heads: columns in ``blocks`` runs, each of all experts in order."""

    def __init__(self, stock: Any, experts: int, blocks: int) -> None:
        super().__init__()
        self.experts, self.blocks = experts, blocks
        self.weight = nn.Parameter(torch.empty_like(stock.weight))
        # Every expert's own bias, under its own gate.
        self.bias = None
        if stock.bias is not None:
            self.bias = nn.Parameter(stock.bias.new_zeros(experts, *stock.bias.shape))
        self.gates_BTN: torch.Tensor | None = None

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads' outputs [B, T, N H d] times gates, projected to [B, T, D]."""
        gates = self.gates_BTN
        if gates is None:
            raise RuntimeError("the output projection was called outside of its attention")
        gates = gates.to(heads.dtype)
        columns = heads.shape[-1] // (self.experts * self.blocks)
        shape = (*heads.shape[:-1], self.blocks, self.experts, columns)
        gated = (heads.reshape(shape) * gates[..., None, :, None]).reshape(heads.shape)
        projected = nn.functional.linear(gated, self.weight)
        return projected if self.bias is None else projected + gates @ self.bias


class HeadNorms(nn.Module):
    """An RMS norm of every head with the weights of its expert, heads of one expert side by side in blocks."""

    def __init__(self, stock: Any, experts: int, blocks: int) -> None:
        super().__init__()
        self.blocks, self.eps = blocks, stock.variance_epsilon
        self.weight = nn.Parameter(stock.weight.new_ones(experts, *stock.weight.shape))

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Normed heads [B, T, H, d]."""
        wide = heads.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        each = heads.shape[-2] // (self.blocks * len(self.weight))
        weight = self.weight.repeat_interleave(each, dim=0).repeat(self.blocks, 1)
        return weight * wide.to(heads.dtype)


@cache
def _mixed(stock: Any) -> type:
    """The attention class that works out the gates from what it is given."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = getattr(self, ROUTER)(hidden_states)
        self.o_proj.gates_BTN = logits.softmax(dim=-1, dtype=torch.float)
        try:
            return stock.forward(self, hidden_states, *args, **kwargs)
        finally:
            self.o_proj.gates_BTN = None

    return type("Mixed" + stock.__name__, (stock,), {"__module__": __name__, "forward": forward})


@cache
def _plain(stock: Any) -> type:
    """The router whose selected weights are their shares of the softmax over all experts."""

    def forward(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, _, index = stock.forward(self, hidden_states)
        weights = logits.softmax(dim=-1, dtype=torch.float).gather(-1, index)
        return logits, weights.to(hidden_states.dtype), index

    return type("Plain" + stock.__name__, (stock,), {"__module__": __name__, "forward": forward})


def apply(body: Any, config: Any) -> None:
    """Put a router and gates into every layer's attention.

    Args:
        body: the stock base model with N times the heads, changed in place.
        config: its ``moesurg_bam`` has ``experts``: N; ``blocks``: 1, or the number of key-value heads where all
            experts share them; ``norms``: names of the attention's head norms that every expert has; ``router``: the
            name of the feed-forwards' router below a layer; ``plain``: whether its selected weights stay as they are.
    """
    entry = getattr(config, KEY)
    experts, blocks = entry["experts"], entry["blocks"]
    for layer in body.layers:
        attention: Any = layer.self_attn
        hidden, like = config.hidden_size, attention.q_proj.weight
        router = nn.Linear(hidden, experts, bias=False, device=like.device, dtype=like.dtype)
        setattr(attention, ROUTER, router)
        attention.o_proj = GatedOutput(attention.o_proj, experts, blocks)
        for name in entry["norms"]:
            setattr(attention, name, HeadNorms(getattr(attention, name), experts, blocks))
        kind: Any = type(attention)
        attention.__class__ = _mixed(kind)
        if entry["plain"]:
            chooser: Any = layer.get_submodule(entry["router"])
            stock: Any = type(chooser)
            chooser.__class__ = _plain(stock)
