"""Router logits to selected experts and weights, exactly as stock transformers computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import RouterRule

if TYPE_CHECKING:
    import torch


def route(
    logits_TE: torch.Tensor,
    rule: RouterRule,
    correction_E: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Select experts.

    Args:
        logits_TE: [T, E] raw router logits, any floating dtype; a router's own bias is part of them.
        rule: the family's semantics.
        correction_E: [E] what is added to the scores for the selection alone.
        dtype: of the hidden states; that of the logits when None.

    Returns:
        weights [T, k] (float32, or ``dtype`` where the family casts them) and indices [T, k] (int64),
        in the order ``torch.topk`` gives them.
    """
    import torch

    if rule.score == "sparsemixer":
        return _sparsemixer(logits_TE, rule.jitter)
    if rule.score == "softmax":
        scores_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    elif rule.score == "sigmoid":
        scores_TE = logits_TE.float().sigmoid()
    else:
        scores_TE = logits_TE.float()
    choice_TE = scores_TE if correction_E is None else scores_TE + correction_E
    if rule.groups > 1:
        choice_TE = _within_groups(choice_TE, rule)
    indices_TK = torch.topk(choice_TE, rule.top_k, dim=-1, sorted=rule.ordered)[1]
    weights_TK = scores_TE.gather(1, indices_TK)
    if rule.score == "selected-softmax":
        weights_TK = torch.softmax(weights_TK, dim=-1)
    elif rule.score == "selected-sigmoid":
        weights_TK = weights_TK.sigmoid()
    if rule.renormalise:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + rule.epsilon).clamp(min=rule.least_sum)
    if rule.scaling != 1.0:
        weights_TK = weights_TK * rule.scaling
    if rule.cast_weights:
        weights_TK = weights_TK.to(logits_TE.dtype if dtype is None else dtype)
    return weights_TK, indices_TK


def _sparsemixer(logits_TE: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The best logit and the best of the others, each weighted by a softmax over the logits near it.

    Near means: no further below, relative to the larger of the two magnitudes, than twice the jitter. The two
    weights are independent, so that they sum to anything up to 2.
    """
    import torch

    left_TE, weights, indices = logits_TE, [], []
    for _ in range(2):
        best_T1, index_T1 = left_TE.max(dim=-1, keepdim=True)
        scale_TE = logits_TE.abs().clamp(min=best_T1)
        far_TE = (best_T1 - logits_TE) / scale_TE > 2 * jitter
        near_TE = left_TE.masked_fill(far_TE, float("-inf"))
        weights.append(torch.softmax(near_TE, dim=-1).gather(-1, index_T1))
        indices.append(index_T1)
        left_TE = logits_TE.scatter(-1, index_T1, float("-inf"))
    return torch.cat(weights, dim=-1), torch.cat(indices, dim=-1)


def _within_groups(choice_TE: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    """Scores with all but the best groups of every token at minus infinity."""
    import torch

    grouped_TGM = choice_TE.view(len(choice_TE), rule.groups, -1)
    score_TG = grouped_TGM.topk(rule.group_size, dim=-1)[0].sum(dim=-1)
    best_TB = torch.topk(score_TG, rule.top_groups, dim=-1, sorted=False)[1]
    kept_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, best_TB, True)
    return grouped_TGM.masked_fill(~kept_TG[:, :, None], float("-inf")).view_as(choice_TE)
