"""What ``lost`` and ``mc-smoe`` share: rows or columns kept exactly beside a matrix of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, option
from ._parts import Entry, PartsOptions, Shape, largest_rank, plan_parts, write_parts

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work
    from ...linalg.lowrank import LowRank

LOWRANK = ("pivot", "factors")
LOWRANK_HELP = "how the low-rank part is stored: some of its rows and coefficients, or two factors"
EXACT_HELP = "fraction of a matrix's {} to keep as they are, at least one"
ROUNDS_HELP = "alternations between what is kept and the subspace of the rest at most"


@dataclass(frozen=True)
class ExactOptions(PartsOptions):
    """What the user chooses of either method, whose ``exact`` have help texts and defaults of their own."""

    exact: float = option(0.02, EXACT_HELP.format("columns"))
    lowrank: str = option("pivot", LOWRANK_HELP, choices=LOWRANK)
    rounds: int = option(2, ROUNDS_HELP)


def plan_exact(models: Sequence[Model], options: ExactOptions, kept: str) -> Draft:
    """Plan with a fixed share of rows or columns kept and the largest rank that the ratio then allows.

    Args:
        kept: ``rows`` or ``columns``.

    Raises:
        UsageError: an option out of range.
    """
    if not 0 <= options.exact < 1:
        raise UsageError(f"--exact {options.exact} should be at least 0 and below 1")
    if options.rounds < 1:
        raise UsageError(f"--rounds {options.rounds} should be at least 1")

    def entry_of(shape: Shape, dtype: str) -> Entry | None:
        side = shape[1] if kept == "columns" else shape[0]
        count = max(1, round(options.exact * side))
        if count >= side:
            return None
        inner = (shape[0], side - count) if kept == "columns" else (side - count, shape[1])

        def make(rank: int) -> Entry:
            return {"form": kept, "exact": count, "rank": rank, "lowrank": options.lowrank}

        # A part of full rank would save nothing.
        top = min(inner) - 1
        rank = largest_rank(make, top, shape, dtype, options.ratio)
        return make(rank) if rank >= 1 else None

    return plan_parts(
        models,
        options,
        entry_of=entry_of,
        params={"rounds": options.rounds},
    )


def split(work: Work) -> dict[str, object]:
    """Split one matrix by columns, or by rows, which are the columns of its transpose."""
    from ...linalg.exact_parts import split_columns
    from ...linalg.lowrank import LowRank

    (region,) = work.unit.reads
    entry = work.params["entry"]
    rows = entry["form"] == "rows"
    matrix = work.read(region).T if rows else work.read(region)
    found = split_columns(matrix, entry["rank"], entry["exact"], work.params["rounds"])
    rest, exact, dense = found.rest, found.exact_MS, found.dense()
    if rows:
        left, right = rest.right_RN.T.contiguous(), rest.left_MR.T.contiguous()
        rest, exact, dense = LowRank(left, right, rest.error, rest.norm), exact.T, dense.T
    tensors = {
        **_inner_tensors(rest, entry["lowrank"]),
        f"{entry['form']}.weight": exact,
        f"{entry['form'].removesuffix('s')}_index": found.index_S,
    }
    return write_parts(work, dense, tensors)


def _inner_tensors(found: LowRank, lowrank: str) -> dict[str, torch.Tensor]:
    """The tensors of the low-rank part."""
    from ...linalg.pivot import pack

    if lowrank == "factors":
        left_MR, right_RN = found.balanced()
        return {"inner.lowrank_A.weight": right_RN, "inner.lowrank_B.weight": left_MR}
    packed = pack(found.left_MR, found.right_RN)
    return {
        "inner.pivot_rows.weight": packed.rows_RN,
        "inner.pivot_coef.weight": packed.coef_SR,
        "inner.pivot_index": packed.index_R,
    }
