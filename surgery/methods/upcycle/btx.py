"""Branch-Train-MiX: the feed-forwards of several models of one shape become experts, everything else their average.

Branch-Train-MiX (arXiv:2403.07816). Expert e of every layer is model e's feed-forward, byte for byte; attention, norms,
embeddings and head are the plain mean over the N models, summed in float64 and rounded once to the stored type; the
router is new, N(0, std^2), or made from a text for each model (``--router-init``), which the first one reads. The
published recipe counts the seed model among the experts and selects two per token.

    MoE(x) = sum_{i in top-k} w_i(x) FFN_i(x),    theta = (1 / N) sum_i theta_i

The models have to be branches of one seed: the same architecture, shapes, types and settings, and the same vocabulary,
because row t of the averaged embedding has to mean the same token everywhere. Anything else is refused with what
differs. Token ids for begin, end and padding may differ; the first model's stay, like its tokenizer files.

N times the same model gives that model's function wherever the target's weights sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...plan import Unit
from ..base import Draft, MethodInfo
from . import _branches as branches
from . import _common as common
from . import _routers as routers
from ._branches import BranchOptions
from ._routers import RouterOptions

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="several models of one shape: feed-forwards become experts, the rest is averaged",
    paper="arXiv:2403.07816",
    inputs="two or more dense models",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(BranchOptions, RouterOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The averaged blocks with one expert from every model.

    Raises:
        InputError: fewer than two models, or models that differ in more than their weights.
        UsageError: counts out of range.
    """

    def keep(name: str, layer: int | None) -> list[Unit]:
        return branches.averages(models[0].whole(name), len(models), layer)

    return branches.mixed(
        models,
        options,
        "experts of different files are mixed, and attention and embeddings are their average",
        top_k=options.top_k,
        target=options.target,
        router_std=options.router_std,
        keep=keep,
    )


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, fill a neutral shared expert, or average one block of a tensor."""
    done = common.fill_common(work)
    if done is not None:
        return done
    return branches.mean(work)
