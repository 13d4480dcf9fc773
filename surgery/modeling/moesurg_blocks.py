"""Mixtures as transformers 5 holds them, for transformers 4: a router, and all experts of a layer in two tensors.

Made by moesurg. Tensors of its outputs are named like the modules of transformers 5, and the parts beside this file
change those modules. Transformers 4 has a module for every expert; here its blocks are replaced by ones with the
modules of transformers 5, which compute the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

NORMALISED = {"MixtralSparseMoeBlock": True, "Qwen2MoeSparseMoeBlock": None}
NORMALISED |= {"Qwen3MoeSparseMoeBlock": None, "OlmoeSparseMoeBlock": None}
"""Blocks that are known, and whether selected weights always sum to one; None where the config says so."""


class Router(nn.Module):
    """Softmax over all experts, then the largest of them.

    Args:
        weight_ED: rows of the router.
        top_k: experts a token selects.
        norm_topk_prob: whether the selected weights are made to sum to one.
    """

    def __init__(self, weight_ED: torch.Tensor, top_k: int, norm_topk_prob: bool) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.num_experts, self.hidden_dim = weight_ED.shape
        self.weight = nn.Parameter(torch.empty_like(weight_ED))

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, E], weights and indices [T, K]."""
        logits_TE = linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        shares_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float)
        weights_TK, index_TK = torch.topk(shares_TE, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return logits_TE, weights_TK.to(logits_TE.dtype), index_TK


class Experts(nn.Module):
    """All experts of a layer.

    Args:
        like: a parameter, for type and device.
        act_fn: the gate's activation.
    """

    def __init__(self, experts: int, hidden: int, width: int, act_fn: Any, like: torch.Tensor):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, width
        self.gate_up_proj = nn.Parameter(like.new_empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(like.new_empty(experts, hidden, width))
        self.act_fn = act_fn

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts: states [T, D], indices and weights [T, K]."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            token, slot = torch.where(top_k_index == expert)
            gate, up = linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            found = linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = found * top_k_weights[token, slot, None]
            output_TD.index_add_(0, token, weighted.to(output_TD.dtype))
        return output_TD


class Block(nn.Module):
    """A mixture, with the shared expert where its family has one."""

    def __init__(self, gate: Router, experts: Experts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output, and the router's logits, which transformers 4 wants beside it."""
        flat_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE, weights_TK, index_TK = self.gate(flat_TD)
        output_TD = self.experts(flat_TD, index_TK, weights_TK)
        if hasattr(self, "shared_expert"):
            shared: Any = self.shared_expert
            share: Any = self.shared_expert_gate
            output_TD = output_TD + torch.sigmoid(share(flat_TD)) * shared(flat_TD)
        return output_TD.reshape(hidden_states.shape), logits_TE


def modernise(body: Any) -> None:
    """Replace the mixtures of a base model of transformers 4 by blocks of this file; others are left alone.

    Raises:
        ImportError: a mixture of another family, for which transformers 5 is needed.
    """
    for layer in body.layers:
        for name in ("block_sparse_moe", "mlp", "feed_forward", "moe"):
            old = layer._modules.get(name)
            if old is not None and isinstance(getattr(old, "experts", None), nn.ModuleList):
                _replace(layer, name, old)


def _replace(layer: Any, name: str, old: Any) -> None:
    kind = type(old).__name__
    if kind not in NORMALISED:
        raise ImportError(f"model code of moesurg needs transformers 5 or newer for {kind}")
    first = old.experts[0]
    mixtral = hasattr(first, "w1")
    like = (first.w1 if mixtral else first.gate_proj).weight
    normalised = NORMALISED[kind]
    norm = bool(old.norm_topk_prob if normalised is None else normalised)
    router = Router(old.gate.weight, old.top_k, norm)
    width, hidden = like.shape
    block = Block(router, Experts(len(old.experts), hidden, width, first.act_fn, like))
    for extra in ("shared_expert", "shared_expert_gate"):
        if hasattr(old, extra):
            setattr(block, extra, getattr(old, extra))
    delattr(layer, name)
    layer.mlp = block
    if name != "mlp":
        # Its forward looks for the old name, which is to be no name of a tensor.
        object.__setattr__(layer, name, block)
