"""From the base towards the mean of its fine-tunes, as far as their agreement says.

Model Stock (arXiv:2403.19522). The first source is the base; for every tensor, with N fine-tunes and d_i = theta_i
- theta_0,

    theta = theta_0 + t mean_i d_i,    t = N c / (1 + (N - 1) c),    c = mean cosine of two changes

Fine-tunes that agree (c = 1) give their mean, fine-tunes at right angles the base. Deviations: a negative c, for
which the paper's picture has no meaning, counts as 0 (mergekit extrapolates away from the mean); the mean is over
cosines of pairs, as in mergekit, not over angles. Inner products are summed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, Exactness, MethodInfo
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="from the base towards the mean of fine-tunes, by their agreement",
    paper="arXiv:2403.19522",
    inputs="a base model first, then two or more models fine-tuned from it",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor between the base and the mean."""
    notes = common.check(models, least=3, based=True)
    return common.plan_merge(
        models,
        {},
        exactness=Exactness("approximate", "the output lies between the base and a mean"),
        notes=notes,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import stock_ratio

    blocks, count = reading.Blocks(work, based=True), len(work.models) - 1
    ratio = stock_ratio(reading.gram(blocks))
    reading.combine(work, blocks, [ratio / count] * count)
    return {"ratio": ratio}
