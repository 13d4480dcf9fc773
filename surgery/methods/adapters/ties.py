"""TIES on adapters: cut every change to its largest elements, elect a sign for each, average what agrees.

    dW_i = B_i A_i, cut to its largest elements;   s = sign(sum_i w_i dW_i)
    dW = sum of the w_i dW_i of sign s / sum of their |w_i|,   truncated to a rank

arXiv:2306.01708. The rule acts on the whole changes, one module at a time, as the paper has it for full weights;
their merge has full rank, and what the truncation to an adapter loses is reported (``truncation_error``). `core
--rule ties` needs no truncation, and is another method: its elements are coordinates in another basis. A sum of
exactly zero elects plus.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..base import MethodInfo, option
from . import _rules as rules

INFO = MethodInfo(
    summary="elect a sign for every element of the changes, average what agrees",
    paper="arXiv:2306.01708",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(rules.DenseOptions):
    """What the user chooses."""

    density: float = option(0.2, rules.DENSITY_HELP)
    normalize: bool = option(True, rules.NORMALIZE_HELP)


plan, transform = rules.plan_dense, rules.transform_dense("ties")
