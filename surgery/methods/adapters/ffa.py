"""Average the second factors of adapters that share the first: the exact mean at the same rank.

    A_i = A for all i,   B = sum_i w_i s_i B_i / sum_i w_i,   so   B A = the weighted mean of the changes

What FFA-LoRA (arXiv:2403.12313) does for federated training, where A is frozen at its common initialisation. Adapters
whose first factors differ in any element are refused: averaging factors apart would add cross terms B_i A_j. Scales
may differ; they go into B, so that A stays as it is stored. Weights are divided by their sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...adapters.output import placed
from ...errors import InputError, UsageError
from ..base import Draft, Exactness, MethodInfo
from . import _merge as common
from . import _saved as saved
from . import _unit as unit

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...linalg.gauge import Pair

INFO = MethodInfo(
    summary="average the second factors of adapters that share the first: an exact mean",
    paper="arXiv:2403.12313",
    inputs="LoRA adapters of one base with one first factor",
    data="none",
    takes="adapters",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """Every module at its rank.

    Raises:
        InputError: ranks or modules differ, so the first factors cannot be the same.
        UsageError: weights that add up to zero.
    """
    for adapter in adapters[1:]:
        ranks = {name: module.rank for name, module in adapter.modules.items()}
        if ranks != {name: module.rank for name, module in adapters[0].modules.items()}:
            raise InputError(
                f"{adapter.folder}: modules or ranks differ from {adapters[0].folder}, so the first factors do",
                hint="use svd or cat, which take any adapters",
            )
    if not sum(common.parse_weights(options.weights, len(adapters))):
        raise UsageError("--weights add up to 0, so no mean can be taken")
    return common.plan_merge(
        adapters,
        options,
        rank=lambda modules: modules[0].rank,
        params={},
        exactness=Exactness("exact", "all adapters share the first factor"),
    )


@saved.beside
def transform(work: Work) -> dict[str, object]:
    """Average one module's second factors."""
    import torch

    name = work.params["module"]
    first, *others = (adapter.modules[name].down for adapter in work.adapters)
    shared = work.read(first)
    for index, region in enumerate(others, start=1):
        if not torch.equal(shared, work.read(placed(region, index))):
            raise InputError(
                f"{work.adapters[index].folder}: module {name}: lora_A differs from that of "
                f"{work.adapters[0].folder}, so averaging lora_B alone would not average the changes",
                hint="use svd or cat, which take any adapters",
            )

    def merged(pairs: list[Pair], weights: list[float]) -> Pair:
        total = sum(weights)
        up = sum(up * (weight / total) for (_, up), weight in zip(pairs, weights, strict=True))
        return pairs[0][0], torch.as_tensor(up)

    def bias(loaded: unit.Loaded) -> torch.Tensor | None:
        found = unit.summed_bias(loaded)
        return None if found is None else found / sum(loaded.weights)

    return unit.merge_each(work, merged, bias=bias, balanced=False)
