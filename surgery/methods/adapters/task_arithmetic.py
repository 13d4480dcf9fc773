"""Task arithmetic on adapters: the scaled sum of their changes, at a rank.

    dW = scale sum_i w_i B_i A_i

arXiv:2212.04089. The changes of adapters are their task vectors, so no base is needed. With the default rank, the sum
of the ranks, it is exact; ``--rank`` truncates to the nearest of a rank, through QR decompositions as in `svd`. A
negative weight takes a task away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _ranks as ranks
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work

INFO = MethodInfo(
    summary="the scaled sum of the changes, exact at the sum of the ranks",
    paper="arXiv:2212.04089",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    scale: float = option(
        1.0, "factor on the sum; the paper tunes it, to 0.3 or 0.4 for many tasks"
    )
    rank: int | None = option(None, ranks.SUM_HELP)


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks, or the chosen rank."""
    if not abs(options.scale) < float("inf"):
        raise UsageError(f"--scale {options.scale} should be finite")
    exactness = Exactness("approximate", "the sum is truncated to a lower rank")
    if options.rank is None:
        exactness = Exactness("exact", "the sum of the ranks holds the sum of the changes")
    return common.plan_merge(
        adapters,
        options,
        rank=ranks.sum_rank(options.rank),
        params={"scale": options.scale},
        exactness=exactness,
    )


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Add up one module's changes."""
    from ...linalg.factors import truncated

    loaded = unit.load(work)
    scale = work.params["scale"]
    joined_down, joined_up = loaded.stack.total
    down, up = truncated((joined_down, joined_up * scale), work.params["rank"])
    bias = unit.summed_bias(loaded)
    return unit.save(work, loaded, down, up, bias=None if bias is None else bias * scale)
