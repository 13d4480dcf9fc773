"""Drop the changes of fine-tunes at random, rescale the rest, and add them up or let them elect signs.

DARE (arXiv:2311.03099). The first source is the base, d_i = theta_i - theta_0. Each element of each d_i is kept
with the probability ``density`` p and divided by p, so that its expectation is d_i:

    theta = theta_0 + scale sum_i w_i (m_i * d_i) / p,    m_i ~ Bernoulli(p)

``--elect`` merges what is left as TIES does (elected signs, then the average of what agrees). ``--rescale l1``
multiplies by the ratio of the tensor's L1 norms before and after dropping instead of by 1 / p, which is what
mergekit calls rescaling: the norm is kept exactly, the expectation only nearly. At ``--density 1`` the method is
task arithmetic. Masks depend on the seed, the tensor and the position of the source, and on nothing else;
mergekit's random numbers are others, so single elements differ from its output by design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
from . import _merge as common
from . import _thinned as thinned

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="drop changes at random and rescale the rest",
    paper="arXiv:2311.03099",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.ChangeOptions):
    """What the user chooses."""

    density: float = option(0.5, "probability that an element of a change is kept")
    rescale: str = option(
        "inverse", "how the rest makes up for what is dropped", choices=("inverse", "l1", "none")
    )
    elect: bool = option(
        False, "whether signs are elected as in TIES before the changes are merged"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor as base plus thinned changes."""
    return common.plan_changes(models, options, what="dropped at random")


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    density = work.params["density"]
    return thinned.merge(work, lambda change: density, divide=work.params["rescale"] == "inverse")
