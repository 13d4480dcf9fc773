"""FlexOlmo: models trained apart beside one frozen public model become the experts of a mixture.

FlexOlmo (arXiv:2507.07024). Every contributor takes the public model, freezes all of it, and trains one feed-forward a
layer beside the frozen one on data that stays with the contributor. The first source is the public model; of each
further one, the dense model with the contributor's feed-forwards, everything else has to equal the public model's, bit
for bit, which is checked as it is read. Expert 0 is public, expert e is source e's. OLMo-2 models become ``flex_olmo``;
other families become what holds their blocks. ``moesurg expert opt-out`` takes a contributor out again.

The router's row of an expert describes its data. ``--data FILE`` is given once for every model, in their order, the
public one's first; with mu_e the mean input of the layer's feed-forward on text e, and c the mean of all mu_e (with
``--neutral``: the last file's):

    d_e = mu_e - c, less its part along c    row_e = d_e / (|d_e| T)

``--router-init prompts`` and ``logistic`` are those of ``prompts``.

Deviations: FlexOlmo's rows are mean document embeddings of another model of the same width, one vector for all
layers, neither centred nor of one length; here the public model itself reads the text and every layer has its
own rows, so nothing is downloaded. Rows need no training, and none of the paper's biases on contributors'
logits, which the released architecture leaves out as well. Selected weights sum to one where the family can do so; the
released models leave them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...errors import InputError
from ...plan import Unit
from ..base import Draft, MethodInfo
from . import _branches as branches
from . import _common as common
from . import _routers as routers
from ._branches import BranchOptions
from ._routers import TextRouterOptions

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="a public model and others that share all but its feed-forwards, with a router made from texts",
    paper="arXiv:2507.07024",
    inputs="two or more dense models",
    data="means",
)


@dataclass(frozen=True, kw_only=True)
class Options(BranchOptions, TextRouterOptions):
    """What the user chooses."""


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The public model's blocks with one expert from every model.

    Raises:
        InputError: fewer than two models, or models that differ in shapes or settings.
        UsageError: counts or temperature out of range.
    """

    def keep(name: str, layer: int | None) -> list[Unit]:
        return [
            replace(unit, id=unit.id.replace("mean.", "same.", 1), params={"part": "same"})
            for unit in branches.averages(models[0].whole(name), len(models), layer)
        ]

    return branches.mixed(
        models,
        options,
        "experts of different files are mixed",
        top_k=options.top_k,
        target=options.target,
        keep=keep,
    )


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Make a router's rows, fill a neutral shared expert, or hold one block of a tensor against all sources."""
    import torch

    part = work.params["part"]
    if part != "same":
        return common.fill_common(work) or {}
    (target,) = work.unit.writes
    first, *others = work.unit.reads
    public = work.read(first)
    for source, region in enumerate(others, start=1):
        if not torch.equal(work.read(region), public):
            raise InputError(
                f"source {source + 1}: {target.tensor} differs from the public model's",
                hint="contributors of FlexOlmo train feed-forwards alone; --method btx averages what differs",
            )
    work.write(target, public)
    return {}
