"""Parts of a feed-forward for each domain of text, chosen for a token before layers run (Read-ME, arXiv:2410.19123).

The router knows token ids alone and is one for all layers. Every token x has evidence u(x) for each of C experts, and a
token's expert is the one for which the tokens up to it speak most, older ones less by a constant factor:

    z_t = sum_{s <= t} 2^(-(t - s) / h) u(x_s)    expert_t = argmax z_t

That is a causal attention whose weights depend on distance alone, and like attention's, its state during generation is
kept in the model's cache: a further layer of it holds the evidence of all tokens, so that reordering, cropping and
repeating a cache do the same to it; caches of a fixed size are refused. Padding has no evidence.

A feed-forward is the neurons that all experts share and the expert's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import cache_utils

KEY = "moesurg_read_me"
ROUTER = "pre_router"
"""The router's name below the base model."""
BLOCK = 256
"""Tokens whose sums are one product."""


def decay(half_life: float) -> float:
    """The factor from one token to the next; a half-life of 0 looks at the token alone."""
    return 0.5 ** (1 / half_life) if half_life > 0 else 0.0


def trailing(evidence_BTC: torch.Tensor, factor: float, past: int = 0) -> torch.Tensor:
    """Decayed sums z [B, T - past, C] of all tokens up to each one after the first ``past``."""
    new_BTC = evidence_BTC[:, past:]
    like: Any = {"dtype": evidence_BTC.dtype, "device": evidence_BTC.device}
    # What lies before the first new token, decayed to the token before it.
    weight_S = factor ** torch.arange(past - 1, -1, -1, **like)
    before_BC = (weight_S[None, :, None] * evidence_BTC[:, :past]).sum(dim=1)
    found = []
    for start in range(0, new_BTC.shape[1], BLOCK):
        block_BTC = new_BTC[:, start : start + BLOCK]
        place_T = torch.arange(block_BTC.shape[1], **like)
        age_TS = place_T[:, None] - place_T
        weight_TS = torch.where(age_TS >= 0, factor ** age_TS.clamp_min(0), 0.0)
        weight_T = factor ** (place_T + 1)
        sums_BTC = weight_TS @ block_BTC + weight_T[None, :, None] * before_BC[:, None]
        before_BC = sums_BTC[:, -1]
        found.append(sums_BTC)
    return torch.cat(found, dim=1)


_DynamicLayer: Any = cache_utils.DynamicLayer


class Evidence(_DynamicLayer):  # type: ignore[misc]
    """The layer of a cache that holds what the tokens speak for: [B, 1, T, C] as keys, nothing as values."""


class PreRouter(nn.Module):
    """Token ids to experts, by a table of evidence [V, C] and a half-life in tokens."""

    def __init__(self, vocab: int, experts: int, like: torch.Tensor) -> None:
        super().__init__()
        place: Any = {"dtype": like.dtype, "device": like.device}
        # Buffers, because no gradient reaches what a choice is made from.
        self.register_buffer("evidence", torch.zeros(vocab, experts, **place))
        # A power of two (or 0), which every type holds; a tensor because the weights decide it.
        self.register_buffer("half_life", torch.zeros(1, **place))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None, held: Any) -> torch.Tensor:
        """The expert of every new token, int64 [B, T].

        Args:
            ids: [B, T].
            mask: [B, S] with S at least T, the last T of which are of these tokens; 0 at padding.
            held: the cache's layer of evidence, which gets that of these tokens, or None.
        """
        wide = torch.float32 if ids.device.type == "mps" else torch.float64
        evidence_VC: Any = self.evidence
        half_life: Any = self.half_life
        evidence_BTC: torch.Tensor = evidence_VC[ids].to(wide)
        if mask is not None:
            if mask.dim() != 2:
                raise ValueError(
                    f"the router before the layers takes a mask of two axes, this one has {mask.dim()}"
                )
            evidence_BTC = evidence_BTC * mask[:, -ids.shape[1] :, None].to(wide)
        past = 0
        if held is not None:
            past = held.get_seq_length()
            keys, _ = held.update(evidence_BTC[:, None], evidence_BTC[:, None, :, :0])
            evidence_BTC = keys[:, 0]
        return trailing(evidence_BTC, decay(float(half_life)), past).argmax(dim=-1)


class Projections(nn.Module):
    """The neurons that all experts share."""

    def __init__(self, hidden: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        place: Any = {"dtype": like.dtype, "device": like.device, "bias": False}
        self.gate_proj = nn.Linear(hidden, width, **place)
        self.up_proj = nn.Linear(hidden, width, **place)
        self.down_proj = nn.Linear(width, hidden, **place)


class Experts(nn.Module):
    """The experts' own neurons: gate and up [C, P, D], down [C, D, P]."""

    def __init__(self, experts: int, hidden: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(like.new_empty(experts, width, hidden))
        self.up = nn.Parameter(like.new_empty(experts, width, hidden))
        self.down = nn.Parameter(like.new_empty(experts, hidden, width))


class DomainFeedForward(nn.Module):
    """A feed-forward of which each token uses its expert's part."""

    def __init__(self, stock: Any, experts: int, shared: int, own: int) -> None:
        super().__init__()
        like, hidden = stock.gate_proj.weight, stock.gate_proj.in_features
        self.act_fn = stock.act_fn
        self.shared = Projections(hidden, shared, like) if shared else None
        self.experts = Experts(experts, hidden, own, like) if own else None
        self.choice_BT: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """States [B, T, D] to states."""
        output = torch.zeros_like(hidden_states)
        shared, experts = self.shared, self.experts
        if shared is not None:
            gate = self.act_fn(shared.gate_proj(hidden_states))
            output = shared.down_proj(gate * shared.up_proj(hidden_states))
        if experts is None:
            return output
        choice = self.choice_BT
        if choice is None or choice.shape != hidden_states.shape[:-1]:
            raise RuntimeError("the feed-forward was called outside of its model")
        rows, choice_N = hidden_states.flatten(0, -2), choice.flatten().to(hidden_states.device)
        output_ND = output.flatten(0, -2)
        for expert in torch.unique(choice_N).tolist():
            token = torch.where(choice_N == expert)[0]
            state = rows[token]
            gate = self.act_fn(linear(state, experts.gate[expert]))
            found = linear(gate * linear(state, experts.up[expert]), experts.down[expert])
            output_ND = output_ND.index_add(0, token, found.to(output_ND.dtype))
        return output_ND.reshape(output.shape)


def _held(body: Any, past: Any) -> Any:
    """The layer of evidence of a cache, made when the cache is new."""
    layers = len(body.layers)
    if (
        past.layer_class_to_replicate is not None
    ):  # a cache that makes its layers when they are used
        while len(past.layers) < layers:
            past.layers.append(past.layer_class_to_replicate())
    if len(past.layers) == layers:
        if past.is_compileable:
            # Whoever made it counts on all of its layers: masks are made for its full size beforehand.
            raise ValueError(
                "a cache of fixed size cannot hold the router's state: use a dynamic one"
            )
        past.layers.append(Evidence())
    held = past.layers[layers]
    if not isinstance(held, Evidence):
        raise ValueError("the cache is of another model: it has a layer more than this one")
    return held


@cache
def _routed(stock: Any) -> type:
    """The base model's class that chooses every token's expert before its layers run."""

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        if input_ids is None:
            raise ValueError("this model chooses experts by token ids: give input_ids")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = cache_utils.DynamicCache(config=self.config)
        held = None if past_key_values is None else _held(self, past_key_values)
        choice_BT = getattr(self, ROUTER)(input_ids, attention_mask, held)
        # Kept after the forward: recomputing layers for a gradient needs it again.
        for layer in self.layers:
            layer.mlp.choice_BT = choice_BT
        return stock.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    return type(
        "PreRouted" + stock.__name__, (stock,), {"__module__": __name__, "forward": forward}
    )


def apply(body: Any, config: Any) -> None:
    """Put the router before a base model's layers, and domains' parts in the place of its feed-forwards.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_read_me`` has ``experts``: C; ``width``: neurons a token uses; ``shared``: by layer, how
            many of them all experts share.
    """
    entry = getattr(config, KEY)
    experts, width = entry["experts"], entry["width"]
    for layer, shared in zip(body.layers, entry["shared"], strict=True):
        owner: Any = layer
        owner.mlp = DomainFeedForward(layer.mlp, experts, shared, width - shared)
    weight = body.get_input_embeddings().weight
    setattr(body, ROUTER, PreRouter(len(weight), experts, weight))
    kind: Any = type(body)
    body.__class__ = _routed(kind)
