"""Iso-C on adapters: the sum of the changes with all its singular values made equal.

    sum_i w_i B_i A_i = U S Vᵀ,   dW = scale mean(S) U Vᵀ

arXiv:2502.04959, in core space. Deviation: the mean is over the singular values that are not zero. The published code
takes it over all min(m, n), which puts most of the norm of a sum of adapters into directions that none of them has.
The sum of the singular values stays; one adapter alone does not stay itself, by design. ``--rank`` truncates, to
arbitrary ones of equal singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _rules as rules
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

INFO = MethodInfo(
    summary="the sum of the changes with all its singular values made equal",
    paper="arXiv:2502.04959",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    scale: float = option(1.0, "factor on the result; the paper tunes it, to about 1.5")
    rank: int | None = option(None, ranks.SUM_HELP)


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks, or the chosen rank."""
    if not abs(options.scale) < float("inf"):
        raise UsageError(f"--scale {options.scale} should be finite")
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.sum_rank(options.rank),
        params={"scale": options.scale},
        exactness=Exactness("approximate", "singular values are replaced by their mean"),
        memory=12,
    )


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Merge one module."""
    from ...linalg.core_space import core_space

    params = work.params

    def merged(pairs: list[Pair], weights: list[float]) -> Pair:
        space = core_space(pairs)
        found = rules.apply("iso", space.cores, weights, rng=work.rng) * params["scale"]
        return space.factors(found, params["rank"])

    return unit.merge_each(work, merged)
