"""Drop the changes of fine-tunes at random, small ones more often than large ones, and merge the rest by elected
signs.

DELLA-Merging (arXiv:2406.11617). The first source is the base, d_i = theta_i - theta_0. In every row of n elements
the one of rank r by magnitude (0 for the smallest) is kept with the probability

    p = density + window (r / (n - 1) - 1/2)

and divided by its own p, so that its expectation is d_i. Then signs are elected and what agrees is averaged as in
TIES; ``--no-elect`` adds up instead.

Deviations. mergekit's ``epsilon`` is half our ``window``, and it rescales a tensor to its former L1 norm
(``--rescale l1``). A row of one element, where its rank is 0/0 and it fails, is kept with the probability
``density``. The paper multiplies the merged change by 1.1 (``--scale``), tuned; the default here is 1. Random
numbers are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, MethodInfo, option
from . import _merge as common
from . import _thinned as thinned

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="drop small changes more often than large ones, elect signs",
    paper="arXiv:2406.11617",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.ChangeOptions):
    """What the user chooses."""

    density: float = option(0.7, "mean probability that an element of a change is kept")
    window: float = option(0.14, "distance between the probabilities of a row's ends")
    rescale: str = option(
        "inverse", "how the rest makes up for what is dropped", choices=("inverse", "l1", "none")
    )
    elect: bool = option(True, "whether signs are elected as in TIES before the changes are merged")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus thinned changes.

    Raises:
        UsageError: probabilities outside 0 to 1.
    """
    half = options.window / 2
    if half < 0 or options.density - half <= 0 or options.density + half > 1:
        raise UsageError(
            f"--density {options.density} and --window {options.window} give probabilities from "
            f"{options.density - half:g} to {options.density + half:g}, which should lie above 0 and up to 1"
        )
    return common.plan_changes(models, options, what="dropped at random", tensors=8)


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import keep_probabilities

    density, window = work.params["density"], work.params["window"]
    return thinned.merge(
        work,
        lambda change: keep_probabilities(change, density, window),
        divide=work.params["rescale"] == "inverse",
    )
