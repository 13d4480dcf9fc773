"""DARE on adapters: drop elements of every change at random, divide the others by the density, add.

    dW = sum_i w_i (mask_i * dW_i) / density,   mask_i ~ Bernoulli(density),   truncated to a rank

arXiv:2311.03099, on the whole changes dW_i = B_i A_i. The expectation is the weighted sum. The masked changes have full
rank, and the truncation to an adapter brings most of what was dropped back: its loss is reported
(``truncation_error``). Masks are drawn from ``--seed``, the module and the adapter's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
from . import _rules as rules

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work

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


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the chosen rank."""
    rules.check_density(options.density)
    return rules.plan_dense(adapters, options, {"density": options.density})


def transform(work: Work) -> dict[str, object]:
    """Merge one module's changes."""
    return rules.transform_dense(work, "dare")
