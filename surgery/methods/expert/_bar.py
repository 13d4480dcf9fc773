"""Experts that no token selects: where a router has a bias that bars them without touching any weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...architectures.model import Experts, Model
    from ...checkpoint.region import Region

BARRED = -1e9
"""The entry of a barred expert."""
BARRED_HALF = -6e4
"""The same where a bias is stored in half precision, whose range ends before."""


def barring(experts: Experts) -> Region | None:
    """The bias that bars, if the layer has one that might."""
    return experts.correction or experts.router_bias


def barred_value(dtype: str) -> float:
    """What is stored for a barred expert in a type."""
    return BARRED_HALF if dtype == "F16" else BARRED


def why_not_barred(model: Model) -> str:
    """Why a barred expert would change the function; empty where it would not.

    A bias for the selection alone leaves weights as they are if scores do not depend on each other (sigmoid); a
    bias on the logits does where weights are a softmax of the selected ones only. In a softmax over all experts
    a further row takes mass even from where nobody selects it.
    """
    layout, score = model.layout, model.rule.score
    if layout is not None and layout.correction and score == "sigmoid":
        return ""
    if layout is not None and layout.router_bias and score == "selected-softmax":
        return ""
    if layout is not None and layout.correction:
        return "weights come from a softmax over all rows, those that nobody selects included"
    return "its router has no bias that keeps an expert from being selected"
