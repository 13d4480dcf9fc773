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

``--preset residual`` is the residual form of DeepSpeed-MoE (arXiv:2201.05596): one selected expert corrects the dense
feed-forward, so k is 1, with its share of the softmax as the weight where the family can leave weights as they are.
DeepSpeed weighs the two by a softmax of their own; stock classes have a sigmoid before the shared expert at most.

``--preset isolated`` is DeepSeekMoE's architecture (arXiv:2401.06066): the feed-forward is cut into E + S segments of
one width, S of them (``--isolated``) are the shared expert and E the routed ones. DeepSeekMoE trains from nothing
and says nothing of which neurons; here the shared ones are those of largest |gate| |up| |down|, the product of their
row and column norms; the others are dealt at random. Routed down projections are multiplied so that with equal weights
a selected expert counts once, and the function is the dense one if all are selected with equal weights: with fewer it
is a start for training. ``split`` looks for segments that work together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common
from . import _routers as routers
from ._isolation import distribute, segment, unit

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
class Options(common.RoutedOptions):
    """What the user chooses."""

    expert_width: int | None = option(
        None, "neurons of a routed expert; by default those of the feed-forward"
    )
    preset: str | None = option(
        None,
        "residual: one silent expert beside the feed-forward (DeepSpeed); isolated: the feed-forward cut into shared "
        "and routed segments (DeepSeekMoE)",
        choices=("residual", "isolated"),
    )
    isolated: int = option(1, "shared segments of the preset of that name")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks, each feed-forward shared, with silent routed experts beside it.

    Raises:
        InputError: no family with a shared expert holds the parent, or an expert would be wider than it.
        UsageError: counts out of range.
    """
    model = common.one_dense(models, "shared-expert upcycling")
    common.check_counts(options.experts, options.top_k, options.router_std)
    routers.check(options, options.experts, 1 if options.preset == "residual" else options.top_k)
    neurons = model.config.integer("intermediate_size")
    if options.preset == "isolated":
        return _plan_isolated(model, options, neurons)
    width = neurons if options.expert_width is None else options.expert_width
    if width < 1:
        raise UsageError(f"--expert-width should be at least 1, is {width}")
    if width > neurons:
        raise InputError(f"--expert-width {width}: the feed-forward has {neurons} neurons")
    residual = options.preset == "residual"
    top_k = 1 if residual else options.top_k
    mixture = _grow(model, options, top_k, width, neurons, {})
    if residual and "norm_topk_prob" in mixture.raw:
        mixture = _grow(model, options, top_k, width, neurons, {"norm_topk_prob": False})

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units = [routers.unit(layer, experts, options)]
        own, moves = common.whole_shared(mixture, layer)
        units.extend(own)
        if width == neurons:
            moves.extend(common.copies(layer, experts)[:2])
        for expert in range(experts.count):
            units.append(_unit(layer, experts, expert, whole=width == neurons))
        return units, moves

    reason = "the shared expert is the dense feed-forward, and routed experts add zero"
    return routers.asking(
        common.draft(mixture, fill, Exactness("exact", reason)), options, options.experts
    )


def _plan_isolated(model: Model, options: Options, neurons: int) -> Draft:
    if options.isolated < 1:
        raise UsageError(f"--isolated should be at least 1, is {options.isolated}")
    if options.expert_width is not None:
        raise UsageError("--preset isolated sets the width itself", hint="leave out --expert-width")
    width = segment(neurons, options.experts, options.isolated)
    mixture = _grow(model, options, options.top_k, width, width * options.isolated, {})

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        router = routers.unit(layer, experts, options)
        return [router, unit(mixture, layer, experts)], []

    reason = "of the routed neurons only those of selected experts work"
    if options.top_k == options.experts:
        reason = "routed experts all work, weighed by the router"
    draft = common.draft(mixture, fill, Exactness("approximate", reason))
    return routers.asking(draft, options, options.experts)


def _grow(
    model: Model,
    options: Options,
    top_k: int,
    width: int,
    shared: int,
    changes: Mapping[str, object],
) -> common.Mixture:
    return common.grow(
        model,
        experts=options.experts,
        top_k=top_k,
        target=options.target,
        width=width,
        shared_width=shared,
        changes=changes,
    )


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, double the shared down projection, or fill a silent expert."""
    import torch

    done = common.fill_common(work)
    if done is not None:
        return done
    if work.params["part"] == "segments":
        return distribute(work)
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
