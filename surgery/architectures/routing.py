"""Router logits to selected experts and weights, exactly as stock transformers computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import RouterRule

if TYPE_CHECKING:
    import torch


def route(logits_TE: torch.Tensor, rule: RouterRule) -> tuple[torch.Tensor, torch.Tensor]:
    """Select experts.

    Args:
        logits_TE: [T, E] raw router logits, any floating dtype.
        rule: the family's semantics.

    Returns:
        weights [T, k] (float32, or the logits' dtype where the family casts back) and indices [T, k] (int64),
        in the order ``torch.topk`` gives them.
    """
    import torch

    scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights_TK, indices_TK = torch.topk(scores_TE, rule.top_k, dim=-1)
    if rule.renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    if rule.scaling != 1.0:
        weights_TK = weights_TK * rule.scaling
    if rule.cast_weights:
        weights_TK = weights_TK.to(logits_TE.dtype)
    return weights_TK, indices_TK
