"""Stack the ranks of all adapters: the exact weighted sum of their changes.

    A = [A_1; ...; A_T],  B = [w_1 B_1, ..., w_T B_T],  so that  B A = sum_i w_i B_i A_i

with each adapter's own scale (alpha / r, or alpha / sqrt(r) when rank-stabilised, by module) folded into its
second factor first. The rank of a module is the sum of the ranks. A is stored as it was, and where scale times weight
is a power of two so is B but for its exponents: then nothing is lost at all. (The common convention, a root of the
scale on both factors, rounds both.) Elsewhere B is rounded to the stored type, which the report measures. This is the
reference that every other way of merging adapters is held against.

``--sweep simplex:step=0.25`` makes an adapter at every point of the grid of weights with the sum 1, and a
``manifest.json``.

Weights go into B with their sign, and an adapter of weight 0 is left out. Biases of B are summed like the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ... import sweep
from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work

INFO = MethodInfo(
    summary="stack the ranks of all adapters: the exact weighted sum",
    paper="arXiv:2409.16167",
    inputs="one or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    sweep: str | None = option(None, sweep.HELP, metavar="GRID")


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at the sum of its ranks."""
    return common.plan_merge(
        adapters,
        options,
        rank=lambda modules: sum(module.rank for module in modules),
        params={},
        exactness=Exactness("exact", "the ranks are stacked, so the changes of the weights add up"),
    )


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Stack a module's factors."""
    loaded = unit.load(work, balanced=False)
    return unit.save(work, loaded, *loaded.stack.total, bias=unit.summed_bias(loaded))
