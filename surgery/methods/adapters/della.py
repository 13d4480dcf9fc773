"""DELLA on adapters: drop elements at random, small ones more often, divide by the probability, elect signs.

    p = density + 0.15 (rank in the row / (n - 1) - 1/2),   mask ~ Bernoulli(p)
    dW = elected signs' average of (mask_i * dW_i) / p_i,   truncated to a rank

arXiv:2406.11617, on the whole changes dW_i = B_i A_i. The window of the probabilities is narrowed where the density
would push them below 0 or above 1. Every kept element is divided by its own probability, so that the expectation of
each pruned change is the change. The loss of the truncation to an adapter is reported (``truncation_error``).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import MethodInfo, option
from . import _rules as rules

INFO = MethodInfo(
    summary="drop small elements of the changes more often than large ones, elect signs",
    paper="arXiv:2406.11617",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(rules.DenseOptions):
    """What the user chooses."""

    density: float = option(0.5, rules.DENSITY_HELP)
    normalize: bool = option(True, rules.NORMALIZE_HELP)


plan, transform = rules.plan_dense, rules.transform_dense("della")
