"""Shared-expert upcycling: the dense feed-forward stays whole as a shared expert, beside silent routed experts.

    MoE(x) = F(x) + sum_i w_i(x) * 0

The routed experts copy the gate and up projections and have a zero down projection, so the output is the dense
model's for every router, top-k, normalisation and scaling factor, where upcycling by copies needs weights that sum to
one. They can be trained at once: the gradient reaches a zero down projection first. MoTE starts from the same layout,
with ternary routed experts that are copies and so change the function; these do not.

Where the family puts a sigmoid gate in front of its shared expert, the gate's row is zero: the gate is 1/2 for every
token, and the shared down projection is doubled, which costs no rounding.

``--expert-width`` makes narrower routed experts, each with its own random choice of the dense neurons; experts of the
full width all copy the feed-forward, and differ in what the router sends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="keep every feed-forward as a shared expert beside silent routed experts",
    paper="",
    inputs="one dense model",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.GrowOptions):
    """What the user chooses."""

    expert_width: int | None = option(
        None, "neurons of a routed expert; by default those of the feed-forward"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks, each feed-forward shared, with silent routed experts beside it.

    Raises:
        InputError: no family with a shared expert holds the parent, or an expert would be wider than it.
        UsageError: counts out of range.
    """
    model = common.one_dense(models, "shared-expert upcycling")
    common.check_counts(options.experts, options.top_k, options.router_std)
    neurons = model.config.integer("intermediate_size")
    width = neurons if options.expert_width is None else options.expert_width
    if width < 1:
        raise UsageError(f"--expert-width should be at least 1, is {width}")
    if width > neurons:
        raise InputError(f"--expert-width {width}: the feed-forward has {neurons} neurons")
    mixture = common.grow(
        model,
        experts=options.experts,
        top_k=options.top_k,
        target=options.target,
        width=width,
        shared_width=neurons,
    )

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units = [common.router_unit(layer, experts, options.router_std)]
        own, moves = common.whole_shared(mixture, layer)
        units.extend(own)
        if width == neurons:
            moves.extend(common.copies(layer, experts)[:2])
        for expert in range(experts.count):
            units.append(_unit(layer, experts, expert, whole=width == neurons))
        return units, moves

    reason = "the shared expert is the dense feed-forward, and routed experts add zero"
    return common.draft(mixture, fill, Exactness("exact", reason))


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, double the shared down projection, or fill a silent expert."""
    import torch

    done = common.fill_common(work)
    if done is not None:
        return done
    *copied, down = work.unit.writes
    if copied:
        neurons = work.unit.reads[0].shape[0]
        order = work.rng("neurons", work.layer, work.params["expert"]).permutation(neurons)
        kept = torch.from_numpy(order[: copied[0].shape[0]]).sort().values
        for source, target in zip(work.unit.reads, copied, strict=True):
            work.write(target, work.read(source).index_select(0, kept))
    work.write(down, torch.zeros(down.shape))
    return {}


def _unit(layer: Layer, experts: Experts, expert: int, *, whole: bool) -> Unit:
    """Fills the down projection with zeros and, in a narrow expert, chooses neurons of gate and up."""
    projections = PROJECTIONS[2:] if whole else PROJECTIONS
    return Unit(
        f"layer.{layer.index}.expert.{expert}",
        "transform",
        layer.index,
        reads=() if whole else (layer.ffn["gate"], layer.ffn["up"]),
        writes=tuple(experts.region(expert, projection) for projection in projections),
        params={"part": "silent", "expert": expert},
        memory=4 * experts.hidden * (4 * experts.width + 2 * layer.ffn["gate"].shape[0]),
    )
