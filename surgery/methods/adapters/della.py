"""DELLA on adapters: drop elements at random, small ones more often, divide by the probability, elect signs.

    p = density + 0.15 (rank in the row / (n - 1) - 1/2),   mask ~ Bernoulli(p)
    dW = elected signs' average of (mask_i * dW_i) / p_i,   truncated to a rank

arXiv:2406.11617, on the whole changes dW_i = B_i A_i. The window of the probabilities is narrowed where the density
would push them below 0 or above 1. Every kept element is divided by its own probability, so that the expectation of
each pruned change is the change. The loss of the truncation to an adapter is reported (``truncation_error``).
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
    normalize: bool = option(True, "divide by the weights that agree; without, the sum stays")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the chosen rank."""
    rules.check_density(options.density)
    return rules.plan_dense(
        adapters, options, {"density": options.density, "normalize": options.normalize}
    )


def transform(work: Work) -> dict[str, object]:
    """Merge one module's changes."""
    return rules.transform_dense(work, "della")
