"""Models of one shape as experts of a mixture whose router is made from texts, one for each model.

What mergekit's MoE merges do with prompts: feed-forwards become experts, attention, norms, embeddings and head are the
first model's (``--rest base``; ``--rest mean``: the average, as in Branch-Train-MiX), and the router's rows come from
what each expert is for. ``--data FILE`` is given once for every model, in their order: prompts, or any text of its
domain; with ``--neutral`` the last file is neutral text. The first model reads them, layer by layer. With mu_e the
mean input of the layer's feed-forward on the text of expert e, and c that on the neutral text or, without one, the
mean of all mu_e:

    d_e = mu_e - c, less its part along c    row_e = d_e / (|d_e| T)

``--temperature`` T: large ones give softer weights; selections do not change. ``--router-init prompts`` reads each line
of a text by itself, all of them counting equally; ``--router-init logistic`` fits a logistic regression that tells
the texts apart.

Differences from mergekit, where it is at fault: rows come from the feed-forward's input, which is what the router sees,
instead of the layer's input; padding counts nowhere and every token does, instead of the last position's; they are
centred, so that what all texts share selects nothing (each row is orthogonal to c: a token at c has equal logits); and
which experts the texts' tokens would select first is reported for every layer: ``selected`` [text, expert] shares of
sampled tokens, and ``load`` over all texts.
Negative prompts are not offered; neutral text stands for what is to be taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
from . import _branches as branches
from . import _common as common
from . import _routers as routers
from ._branches import BranchOptions
from ._routers import TextRouterOptions

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work
    from ...plan import Unit

INFO = MethodInfo(
    summary="several models of one shape as experts, with a router made from a text for each",
    paper="mergekit",
    inputs="two or more dense models",
    data="means",
)


@dataclass(frozen=True, kw_only=True)
class Options(BranchOptions, TextRouterOptions):
    """What the user chooses."""

    rest: str = option(
        "base",
        "everything but the feed-forwards: the first model's, or the mean of all",
        choices=("base", "mean"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The first model's (or averaged) blocks with one expert from every model.

    Raises:
        InputError: fewer than two models, or models that differ in more than their weights.
        UsageError: counts or temperature out of range.
    """

    def averaged(name: str, layer: int | None) -> list[Unit]:
        return branches.averages(models[0].whole(name), len(models), layer)

    return branches.mixed(
        models,
        options,
        "experts of different files are mixed",
        top_k=options.top_k,
        target=options.target,
        keep=averaged if options.rest == "mean" else None,
    )


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Make a router's rows, fill a neutral shared expert, or average one block of a tensor."""
    part = work.params["part"]
    if part == "mean":
        return branches.mean(work)
    return common.fill_common(work) or {}
