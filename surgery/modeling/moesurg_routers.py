"""Routers of two layers, and routers that see the logits of the layer before (MoE++). Part of the model code of
moesurg.

    logits_l = B tanh(A x) + M logits_{l-1}

over the layers whose feed-forward is a mixture; either part can be absent, B tanh(A x) being the stock W x then. The
router's stored weight is [B | M] (or [W | M]), A is ``first``; what follows from the logits is the stock class's own.
The inner layer is computed in float32. Layers run in order, so a checkpointed backward pass must not run a single
layer again when there is an M.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

KEY = "moesurg_routers"
FIRST = "first"
"""Parameter of a router's module: A [H, D]."""


@cache
def _with_parts(stock: Any) -> type:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        first = getattr(self, FIRST, None)
        width = self.moesurg_inputs if first is None else first.shape[1]
        x_TD = hidden_states.reshape(-1, width)
        if first is not None:
            inner_TH = nn.functional.linear(x_TD.float(), first.float()).tanh()
            x_TD = inner_TH.to(x_TD.dtype)
        passed = self.moesurg_passed
        if self.moesurg_residual:
            before_TE = passed["logits"].to(x_TD)
            x_TD = torch.cat((x_TD, before_TE), dim=-1)
        if passed is not None:
            passed["logits"] = nn.functional.linear(x_TD.float(), self.weight.float())
        return stock.forward(self, x_TD, *args, **kwargs)

    return type("Moepp" + stock.__name__, (stock,), {"__module__": __name__, "forward": forward})


def apply(body: Any, config: Any) -> None:
    """Give the listed layers of a base model such routers.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_routers`` has ``layers``, in order; ``router``: the name below a layer of the router's
            weight; ``hidden``: rows H of A, or 0 for none; ``residual``: whether there is an M, in all listed layers
            but the first.
    """
    entry = getattr(config, KEY)
    passed: dict[str, torch.Tensor] | None = {} if entry["residual"] else None
    for number, index in enumerate(entry["layers"]):
        place, _, leaf = entry["router"].rpartition(".")
        router: Any = body.layers[int(index)].get_submodule(place)
        old = getattr(router, leaf)
        rows, inputs = old.shape
        residual = entry["residual"] and number > 0
        columns = (entry["hidden"] or inputs) + (rows if residual else 0)
        setattr(router, leaf, nn.Parameter(old.new_zeros(rows, columns)))
        if entry["hidden"]:
            setattr(router, FIRST, nn.Parameter(old.new_zeros(entry["hidden"], inputs)))
        for attribute in ("hidden_dim", "in_features"):
            if getattr(router, attribute, None) == inputs:
                setattr(router, attribute, columns)
        kind: Any = type(router)
        router.__class__ = _with_parts(kind)
        router.moesurg_inputs, router.moesurg_residual = inputs, residual
        router.moesurg_passed = passed
