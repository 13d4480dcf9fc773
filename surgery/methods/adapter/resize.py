"""Give an adapter another rank: the nearest of that rank, or the same change at the rank that it really has.

    B A = U S Vᵀ,   A' = S_k^(1/2) V_kᵀ,   B' = U_k S_k^(1/2)

through QR decompositions of the factors, module by module, optimal in the Frobenius norm. With ``--rank`` at least the
adapter's own the change stays as it is. ``--energy`` takes the smallest rank of each module that keeps a share of the
squared singular values; 1 takes the rank that the module really has.

Ranks are written in the order of their singular values, so the first k of them are the nearest of rank k for every k:
an adapter that was trained without nested dropout can be cut like one of DyLoRA's (arXiv:2210.07558) only after this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.packing import LAYOUTS
from ...errors import InputError
from ..adapters import _merge as common
from ..adapters import _ranks as ranks
from ..adapters import svd
from ..base import Draft, Exactness, MethodInfo, option

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter

INFO = MethodInfo(
    summary="give an adapter another rank, the nearest, with its ranks in order of strength",
    paper="",
    inputs="one LoRA adapter",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    weights: str | None = option(None, "factor on the adapter's change", metavar="W")
    rank: int | None = option(None, "rank of every module; by default its own")
    energy: float | None = option(
        None, "instead: the smallest rank that keeps this share of the squared singular values"
    )
    expert_layout: str | None = option(
        None, "how stacked experts' second factors are stored", choices=LAYOUTS
    )

    @property
    def missing(self) -> str:
        """A single adapter lacks nothing that another has."""
        return "zero"

    @property
    def full_tensors(self) -> str:
        """Nor does it differ from one."""
        return "refuse"

    @property
    def base(self) -> None:
        """So that no base is read."""


# One adapter at a rank is the sum of one.
decide_from_weights, transform = svd.decide_from_weights, svd.transform


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the chosen rank.

    Raises:
        InputError: more than one adapter.
    """
    return _plan(adapters, options, None)


def settle(adapters: Sequence[Adapter], options: Options, decisions: Any) -> Draft | None:
    """The plan at the decided ranks."""
    return _plan(adapters, options, decisions["None"]) if decisions else None


def _plan(adapters: Sequence[Adapter], options: Options, decided: Any) -> Draft:
    if len(adapters) != 1:
        raise InputError(
            f"resizing takes one adapter, {len(adapters)} were given",
            hint="moesurg merge --method svd merges several at a rank",
        )
    most = max(module.rank for module in adapters[0].modules.values())
    exactness = Exactness("approximate", "the change is truncated to a lower rank")
    if options.energy is None and (options.rank is None or options.rank >= most):
        exactness = Exactness("exact", "no module loses a rank")
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.chosen_rank(options.rank, options.energy, decided),
        params={},
        exactness=exactness,
    )
