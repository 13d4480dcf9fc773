"""MC-SMoE without training: M-SMoE, then every merged matrix as low rank plus a few rows of what is missing.

Merge, Then Compress (arXiv:2310.01334) merges as ``m-smoe`` does and then writes each matrix of the merged experts as
W = L + S, L of rank R by singular value decomposition and S the residual, of which whole rows (of the matrix as it is
stored, [out, in]) are pruned until a tenth is left.

**This is the data-free analogue of that second step, not the paper's.** The paper learns which rows stay: it trains
for thousands of steps with a task loss and distillation and prunes rows by the smoothed mean of |S * gradient|. Here
nothing is trained: the rows of S with the largest Euclidean norm stay, ``--keep-rows`` of each matrix, rounded down
(the paper shares them out over all matrices by one threshold). For a given L this choice loses the least, and the
kept rows come out exactly. ``--refits`` chooses L and the rows in turn, L fitted to the other rows alone; no round
makes it worse. Expect damage where the paper, after training, reports little.

Experts that were merged with no other are compressed as well, as in the paper. The result is written as full
matrices that any stock loader takes, so it saves nothing on disk beyond the merge; the notes say what the factors
would take. Reconstruction is not offered, since solved down projections have full rank and dense rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from .._mixture import mixture
from ..base import Draft, Exactness, MethodInfo, option
from . import m_smoe
from ._merge import settle_at_counts
from ._merge_unit import transform_merge

if TYPE_CHECKING:
    from ...architectures.model import Model

INFO = MethodInfo(
    summary="m-smoe, then each merged matrix as low rank and a few dense rows, by magnitude without training",
    paper="arXiv:2310.01334",
    inputs="one mixture of experts",
    data="routed",
)


@dataclass(frozen=True, kw_only=True)
class Options(m_smoe.Grouped):
    """What the user chooses."""

    rank: int = option(32, "rank of the low-rank part; matrices of no larger rank stay whole")
    keep_rows: float = option(0.1, "share of the rows of a matrix that stay exact, from 0 to 1")
    refits: int = option(0, "rounds of choosing low-rank part and rows in turn")


def plan(models: Sequence[Model], options: Options, counts: dict[int, int] | None = None) -> Draft:
    """A checkpoint with ``options.experts`` compressed experts a layer, or as many as a global allocation gave each."""
    if options.rank < 0 or options.refits < 0:
        name, value = ("--rank", options.rank) if options.rank < 0 else ("--refits", options.refits)
        raise UsageError(f"{name} should not be negative, is {value}")
    if not 0 <= options.keep_rows <= 1:
        raise UsageError(f"--keep-rows should be from 0 to 1, is {options.keep_rows:g}")
    factors = {"rank": options.rank, "keep_rows": options.keep_rows, "refits": options.refits}
    draft = m_smoe.plan_grouped(
        models,
        options,
        counts=counts,
        params={"factors": factors},
    )
    reason = "experts are averaged, and their matrices approximated"
    return dataclasses.replace(
        draft,
        exactness=Exactness("approximate", reason),
        notes=[*draft.notes, _size(models[0], options)],
    )


settle = settle_at_counts(plan)


decide = m_smoe.decide_groups


transform = transform_merge


def _size(model: Model, options: Options) -> str:
    """What the factors would take, in numbers per expert."""
    experts = mixture(model.moe_layers[0])
    whole = factored = 0
    for rows, columns in (
        (experts.width, experts.hidden),
        (experts.width, experts.hidden),
        (experts.hidden, experts.width),
    ):
        kept = int(options.keep_rows * rows)
        whole += rows * columns
        # The low-rank part need not hold what the exact rows hold, but their indices are stored.
        factors = options.rank * (rows + columns) + kept * columns + kept
        factored += min(factors, rows * columns)
    return (
        f"stored dense; as factors and rows an expert of {whole:,} numbers would take {factored:,} "
        f"({factored / whole:.0%})"
    )
