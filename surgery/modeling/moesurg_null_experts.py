"""Experts without a feed-forward: zero, copy and constant ones. Part of the model code of moesurg.

The router has rows for the stock experts, then for constant, copy and zero experts, in this order. A token that
selects a zero expert computes nothing for it, a copy expert gives the token itself, and a constant expert

    a_1 x + a_2 v,    (a_1, a_2) = softmax(W_c x)

with a learned vector v. The weight of selected zero experts goes to the others that were selected, in proportion,
where the config says ``renormalise``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from .moesurg_mixtures import resize

KEY = "moesurg_null_experts"
GATES, VALUES = "constant_gates", "constant_values"
"""Parameters of the experts' module: W_c [C, 2, D] and v [C, D]."""


def _shared_out(weights_TK: torch.Tensor, lost_TK: torch.Tensor) -> torch.Tensor:
    """Weights with those that are lost given to the others; zero where all are lost."""
    kept_TK = weights_TK.masked_fill(lost_TK, 0)
    whole, rest = weights_TK.sum(-1, keepdim=True), kept_TK.sum(-1, keepdim=True)
    return kept_TK * (whole / rest.masked_fill(rest == 0, 1))


@cache
def _with_null(stock: Any) -> type:
    def forward(
        self: Any, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        entry, real = self.moesurg_null, self.num_experts
        copies = real + entry["constant"]
        zeros = copies + entry["copy"]
        if entry["renormalise"]:
            weights = _shared_out(weights, index >= zeros)
        output = torch.zeros_like(hidden_states)
        token, slot = torch.where(index < real)
        if len(token):
            # One selection a row, so that tokens with fewer experts cost less.
            found = stock.forward(
                self, hidden_states[token], index[token, slot, None], weights[token, slot, None]
            )
            output.index_add_(0, token, found.to(output.dtype))
        token, slot = torch.where((index >= copies) & (index < zeros))
        weight = weights[token, slot, None].to(output.dtype)
        output.index_add_(0, token, hidden_states[token] * weight)
        for number in range(entry["constant"]):
            token, slot = torch.where(index == real + number)
            state, weight = hidden_states[token], weights[token, slot, None].to(output.dtype)
            gates = nn.functional.linear(state, getattr(self, GATES)[number]).softmax(dim=-1)
            mixed = gates[:, :1] * state + gates[:, 1:] * getattr(self, VALUES)[number]
            output.index_add_(0, token, mixed * weight)
        return output

    return type("Null" + stock.__name__, (stock,), {"__module__": __name__, "forward": forward})


def apply(body: Any, config: Any) -> None:
    """Give the listed layers of a base model experts without a feed-forward.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_null_experts`` has ``layers``; ``router``: names below a layer of what has one entry a
            row; ``experts``: that of the experts' module; ``constant``, ``copy``, ``zero``: how many of each;
            ``renormalise``: whether a zero expert's weight goes to the others.
    """
    entry = getattr(config, KEY)
    more = entry["constant"] + entry["copy"] + entry["zero"]
    for index in entry["layers"]:
        layer = body.layers[int(index)]
        experts: Any = layer.get_submodule(entry["experts"])
        before, hidden = experts.num_experts, experts.down_proj.shape[1]
        for name in entry["router"]:
            resize(layer, name, before, before + more)
        if entry["constant"]:
            new = experts.down_proj.new_zeros
            setattr(experts, GATES, nn.Parameter(new(entry["constant"], 2, hidden)))
            setattr(experts, VALUES, nn.Parameter(new(entry["constant"], hidden)))
        kind: Any = type(experts)
        experts.__class__ = _with_null(kind)
        experts.moesurg_null = dict(entry)
