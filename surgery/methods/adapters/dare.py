"""DARE on adapters: drop elements of every change at random, divide the others by the density, add.

    dW = sum_i w_i (mask_i * dW_i) / density,   mask_i ~ Bernoulli(density),   truncated to a rank

arXiv:2311.03099, on the whole changes dW_i = B_i A_i. The expectation is the weighted sum. The masked changes have full
rank, and the truncation to an adapter brings most of what was dropped back: its loss is reported
(``truncation_error``). Masks are drawn from ``--seed``, the module and the adapter's place.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import MethodInfo, option
from . import _rules as rules

INFO = MethodInfo(
    summary="drop elements of the changes at random, scale up the others, add",
    paper="arXiv:2311.03099",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(rules.DenseOptions):
    """What the user chooses."""

    density: float = option(0.5, rules.DENSITY_HELP)


plan, transform = rules.plan_dense, rules.transform_dense("dare")
