"""Experts of three values, four to a byte. Part of the model code of moesurg.

Every matrix is a scale times codes of -1, 0 and 1, stored as code + 1 in two bits each, the first one lowest. What an
expert is given, and its hidden neurons, are rounded to 8 bits a token where the config says so:

    s = 127 / max(max |x|, 1e-5),   x' = clip(round(x s), -128, 127) / s

This is for running, not for training, which needs the weights that the codes were made from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEY = "moesurg_ternary_experts"


class TernaryExperts(nn.Module):
    """The experts of a layer; called as the stock ones are."""

    def __init__(self, experts: int, hidden: int, width: int, act_fn: Any, *, int8: bool) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.width = experts, hidden, width
        self.act_fn, self.int8 = act_fn, int8
        for part, rows, columns in (
            ("gate", width, hidden),
            ("up", width, hidden),
            ("down", hidden, width),
        ):
            shape = (experts, rows, (columns + 3) // 4)
            self.register_buffer(f"{part}_codes", torch.zeros(shape, dtype=torch.uint8))
            self.register_parameter(f"{part}_scale", nn.Parameter(torch.zeros(experts)))

    def _linear(self, part: str, expert: int, x: torch.Tensor, columns: int) -> torch.Tensor:
        packed: Any = getattr(self, f"{part}_codes")[expert]
        codes = torch.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
        signs = codes.flatten(-2)[..., :columns].to(x.dtype) - 1
        scale: Any = getattr(self, f"{part}_scale")[expert]
        return nn.functional.linear(x, signs * scale.to(x.dtype))

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        if not self.int8:
            return x
        scale = 127 / x.abs().amax(dim=-1, keepdim=True).float().clamp_min(1e-5)
        return ((x.float() * scale).round().clamp(-128, 127) / scale).to(x.dtype)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the selected experts: states [T, D], indices and weights [T, K]."""
        output = torch.zeros_like(hidden_states)
        given = self._rounded(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            state = given[token]
            gate = self._linear("gate", expert, state, self.hidden)
            neurons = self.act_fn(gate) * self._linear("up", expert, state, self.hidden)
            found = self._linear("down", expert, self._rounded(neurons), self.width)
            weighted = found * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def apply(body: Any, config: Any) -> None:
    """Put ternary experts in the place of the listed layers' experts.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_ternary_experts`` has ``layers``, ``experts``: the name of the experts' module below a
            layer, and ``int8``: whether activations are rounded.
    """
    entry = getattr(config, KEY)
    place, _, leaf = entry["experts"].rpartition(".")
    for index in entry["layers"]:
        owner: Any = body.layers[int(index)].get_submodule(place)
        old: Any = getattr(owner, leaf)
        experts, hidden, width = old.down_proj.shape
        new = TernaryExperts(experts, hidden, width, old.act_fn, int8=bool(entry["int8"]))
        setattr(owner, leaf, new)
