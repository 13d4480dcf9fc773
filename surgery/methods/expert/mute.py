"""Switch off the experts that one kind of text selects more often than another.

MoTE and its functional token resonance (arXiv:2502.11096) find experts that are specific to a behaviour by how much
more often prompts that show it select them than prompts that do not, and disable a handful. Here, with f the share of
a text's tokens that select an expert of a layer (the stock router's own choices):

    difference = f on the text --more  -  f on the text --less

Both are domains of the statistics: files given to ``--data`` are named by their stems (``.jsonl`` files hold one prompt
a line), and all their tokens count, where the paper looks at resonance tokens alone. The ``--count`` experts with the
largest positive difference go, of the whole model or, with ``--per layer``, of every layer; of equal ones the first.
An expert whose layer (or whose group in a router with groups) has no more to spare is passed over.

Switched off means never selected:

``bias``     where the family's router has a bias that counts for the selection alone, or one before a softmax of the
             selected, the entries of these experts become so low that no score comes near. All else is moved byte for
             byte, shapes stay, and the old values of the bias undo it. What other experts weigh does not depend on it,
             except through the renormalisation of those that are selected.
``removal``  elsewhere: the experts are dropped as by ``prune``. Where layers then differ, the output is padded for
             stock classes if that is exact, and brings its own model code if not; ``--per layer`` keeps them equal.

A router row of large negative numbers would be no such switch: the sign of its logit depends on the input. What a text
selects says little about what an expert does; measure what was lost on other text before using the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from .._mixture import mixture, one_mixture, prediction_notes
from .._stored import NEVER
from ..base import Draft, Exactness, MethodInfo, option, required
from ..experts._merge import undecided
from ..prune._keep import groups_of, members
from ..prune._prune import plan_prune, transform_prune

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model
    from ...calibration.statistics import Statistics
    from ...execute import Work

INFO = MethodInfo(
    summary="switch off the experts that one kind of text selects more often than another",
    paper="arXiv:2502.11096",
    inputs="one mixture of experts",
    data="routed",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    more: str = required(
        "text whose experts are switched off: the stem of a file of --data", metavar="DOMAIN"
    )
    less: str = required("text they are compared with: the stem of another file", metavar="DOMAIN")
    count: int = required("experts to switch off")
    per: str = option(
        "model",
        "whether the count is of the whole model or of every layer",
        choices=("model", "layer"),
    )
    by: str = option(
        "auto",
        "bias: an exact selection bias; removal: drop them; auto: bias where the family has one",
        choices=("auto", "bias", "removal"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The model with a changed bias, or with experts to be dropped.

    Raises:
        UsageError: one text for both sides, or no experts to switch off.
        InputError: no mixture, no bias where one is asked for, or more experts than can be spared.
    """
    model = one_mixture(models, "muting", "mute")
    if options.more == options.less:
        raise UsageError(f"--more and --less are both {options.more!r}; they should be two texts")
    spare = model.experts - _least(model)
    most = spare if options.per == "layer" else spare * len(model.moe_layers)
    if not 1 <= options.count <= most:
        raise UsageError(
            f"{model.folder}: --count {options.count} asked for, 1 to {most} experts can be switched off"
        )
    if _by_bias(model, options):
        return _plan_bias(model)
    if options.per == "layer":
        return plan_prune(models, model.experts - options.count)
    draft = plan_prune(models, model.experts)
    reason = "tokens of the muted experts go to others"
    return undecided(dataclasses.replace(draft, exactness=Exactness("approximate", reason)))


def settle(models: Sequence[Model], options: Options, decisions: Mapping[str, Any]) -> Draft | None:
    """The numbers of experts that are left, where they are dropped over the whole model."""
    if options.per == "layer" or _by_bias(models[0], options):
        return None
    counts = {int(index): len(decided["kept"]) for index, decided in decisions.items()}
    return plan_prune(models, models[0].experts, counts=counts)


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Muted and kept experts of every layer. Uses no randomness."""
    found = {
        layer.index: difference(statistics, layer.index, options.more, options.less)
        for layer in model.moe_layers
    }
    muted = {index: set[int]() for index in found}
    layers = [[index] for index in found] if options.per == "layer" else [list(found)]
    for some in layers:
        _choose(model, {index: found[index] for index in some}, options.count, muted)
    return {
        str(index): {
            "muted": sorted(muted[index]),
            "kept": [expert for expert in range(model.experts) if expert not in muted[index]],
            "difference": shares,
        }
        for index, shares in found.items()
    }


def transform(work: Work) -> dict[str, object]:
    """Write a layer's bias, or move the experts that are kept."""
    if work.params["part"] != "bias":
        return transform_prune(work)
    region = _bias(work.model.layers[work.layer])
    if region is None:
        raise InputError(f"layer {work.layer}: the router has no bias")
    bias_E = work.read(region).clone()
    bias_E[work.decision["muted"]] = NEVER.get(work.model.dtype(region.tensor), -1e9)
    work.write(region, bias_E)
    return {"muted": work.decision["muted"]}


def difference(statistics: Statistics, layer: int, more: str, less: str) -> list[float]:
    """Share of one text's tokens that select each expert, less the share of another's.

    Raises:
        InputError: a text that is no domain of the statistics, or without tokens.
    """
    shares = []
    for domain in (more, less):
        found = statistics.layer(layer, [domain])
        if not found.tokens:
            raise InputError(f"layer {layer}: the statistics saw no token of {domain!r}")
        shares.append([float(count) / float(found.tokens) for count in found.count_E])
    return [first - second for first, second in zip(*shares, strict=True)]


def _choose(
    model: Model, found: Mapping[int, Sequence[float]], count: int, muted: dict[int, set[int]]
) -> None:
    """Mute the experts of largest difference, each where its group can spare it."""
    groups = members(model.experts, groups_of(model).count)
    spare = len(groups[0]) - _least(model) // len(groups)
    ranked = sorted(
        (-value, index, expert)
        for index, shares in found.items()
        for expert, value in enumerate(shares)
        if value > 0
    )
    left = count
    for _, index, expert in ranked:
        group = next(group for group in groups if expert in group)
        if left and len(muted[index] & set(group)) < spare:
            muted[index].add(expert)
            left -= 1
    if left:
        where = f"layer {next(iter(found))}" if len(found) == 1 else "the model"
        raise InputError(
            f"{where}: only {count - left} experts are selected more often by the first text and can be spared, "
            f"--count {count} asked for",
            hint="use a smaller --count",
        )


def _least(model: Model) -> int:
    """Experts that every layer needs, the same number in every group."""
    groups = groups_of(model)
    if groups.count == 1:
        return max(model.rule.top_k, model.rule.least_experts)
    return groups.count * max(2, -(-model.rule.top_k // groups.selected))


def _bias(layer: Layer) -> Region | None:
    experts = mixture(layer)
    return experts.correction or experts.router_bias


def _by_bias(model: Model, options: Options) -> bool:
    layout = model.layout
    exact = layout is not None and (
        bool(layout.correction)
        or (bool(layout.router_bias) and model.rule.score == "selected-softmax")
    )
    if options.by == "bias" and not exact:
        raise InputError(
            f"{model.folder}: the router of {model.family.model_type} has no bias that switches an expert off and "
            "nothing else",
            hint="--by removal drops the experts",
        )
    return exact and options.by != "removal"


def _plan_bias(model: Model) -> Draft:
    biases = {layer.index: _bias(layer) for layer in model.moe_layers}
    changed = {region.tensor for region in biases.values() if region is not None}
    passing: dict[int | None, list[str]] = {}
    owner = {name: layer.index for layer in model.layers for name in layer.names}
    tensors = []
    for name in model.names():
        tensors.append(TensorSpec(name, model.dtype(name), model.checkpoint.tensors[name].shape))
        if name not in changed:
            passing.setdefault(owner.get(name), []).append(name)
    units = [
        Unit(
            f"layer.{index}.bias",
            "transform",
            index,
            writes=(region,),
            params={"part": "bias"},
            memory=64 * region.count,
        )
        for index, region in biases.items()
        if region is not None
    ]
    for index, names in passing.items():
        label = "outer" if index is None else f"layer.{index}"
        moves = [(model.whole(name), [model.whole(name)]) for name in names]
        units.append(copy_unit(f"{label}.unchanged", moves, layer=index))
    return Draft(
        dict(model.config.raw),
        tensors,
        units,
        Exactness("approximate", "tokens of the muted experts go to others"),
        notes=prediction_notes(model),
    )
