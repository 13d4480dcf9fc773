"""The nearest adapter of a rank to the weighted sum of all (Eckart and Young).

    U S Vᵀ = sum_i w_i B_i A_i,   A = S_k^(1/2) V_kᵀ,   B = U_k S_k^(1/2)

computed without the sum itself: QR decompositions of the stacked factors and an SVD of a matrix as large as the sum of
the ranks. No adapter of that rank is closer in the Frobenius norm; what is lost is the root of the sum of the
remaining singular values' squares, and is reported. With the rank of the sum nothing is lost.

The rank is that of ``--rank``, or what keeps a share of the squared singular values (``--energy``), or by default the
largest rank that an adapter has in a module. With stacked experts, all experts of a module get one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="the nearest adapter of a rank to the weighted sum of all",
    paper="",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    rank: int | None = option(None, ranks.RANK_HELP)
    energy: float | None = option(None, ranks.ENERGY_HELP)


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the chosen rank."""
    return _plan(adapters, options, None)


def decide_from_weights(
    model: Any, options: Options, statistics: Any, weights: Weights, seed: int
) -> dict[str, Any]:
    """The ranks that keep the wanted energy; nothing where ranks do not depend on the weights."""
    if options.energy is None:
        return {}
    return ranks.decide_ranks(weights, options, options.energy)


def settle(adapters: Sequence[Adapter], options: Options, decisions: Any) -> Draft | None:
    """The plan at the decided ranks."""
    return _plan(adapters, options, decisions["None"]) if decisions else None


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Truncate a module's sum."""
    from ...linalg.factors import truncated

    loaded = unit.load(work)
    down, up = truncated(loaded.stack.total, work.params["rank"])
    return unit.save(work, loaded, down, up, bias=unit.summed_bias(loaded))


def _plan(adapters: Sequence[Adapter], options: Options, decided: Any) -> Draft:
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.chosen_rank(options.rank, options.energy, decided),
        params={},
        exactness=Exactness("approximate", "the sum is truncated to a lower rank"),
    )
