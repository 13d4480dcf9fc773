"""The machinery all pruning methods share: the plan of a mixture with fewer experts, and its bytes.

A method decides which experts of every layer stay. Their tensors, their rows of the router and their entries of
anything else that counts experts are moved byte for byte, in their original order; the config's counts change,
and nothing else does. For a softmax router the result is the original with the dropped experts' logits at minus
infinity before the softmax: where weights are not renormalised, those of the kept experts grow. Filling a router
row with large negative numbers is no such mask, since the sign of its logit depends on the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...checkpoint.region import Region
from ...errors import InputError, MoesurgError
from ...plan import COPY_BUFFER, Unit
from .._forms import Stored, pad, ragged, uniform
from .._mixture import mixture, one_mixture, prediction_notes, replaced
from ..base import Draft, Exactness, required
from ._keep import check_counts, groups_of

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work


@dataclasses.dataclass(frozen=True)
class CountOptions:
    """What the user chooses, of a method that sees no text."""

    experts: int = required("experts to keep in every layer")


def plan_prune(
    models: Sequence[Model], experts: int, *, counts: Mapping[int, int] | None = None
) -> Draft:
    """A checkpoint with ``experts`` of the original experts in every layer.

    Args:
        counts: experts by layer instead, where layers differ.

    Raises:
        InputError: not one MoE, or a count its router cannot work with.
    """
    model = one_mixture(models, "pruning", "prune")
    if counts is None:
        check_counts(
            model.experts, experts, model.rule.top_k, groups_of(model), where=str(model.folder)
        )
    for layer in model.moe_layers:
        _check_types(model, layer)
    form = uniform(model, experts) if counts is None else ragged(model, counts)
    tensors, units = replaced(model, form.specs, lambda layer: _units(layer, form.of(layer)))
    all_kept = all(stored.filled == model.experts for stored in form.layers.values())
    exactness = (
        Exactness("bitwise", "every expert is kept")
        if all_kept
        else Exactness("approximate", "tokens of dropped experts go to others")
    )
    notes = [*prediction_notes(model), *form.note()]
    if counts is None and model.experts % 8 == 0 and experts % 8:
        notes.append(
            f"{experts} experts divide by fewer devices than {model.experts}: expert-parallel serving "
            "often wants a multiple of 8"
        )
    return Draft(
        form.config(),
        tensors,
        units,
        exactness,
        tier=form.tier,
        notes=notes,
        files=form.files(),
    )


def transform_prune(work: Work) -> dict[str, object]:
    """Move the kept experts, or what counts experts, to their places."""
    experts = mixture(work.model.layers[work.layer])
    form = Stored.from_json(work.params["form"])
    kept = kept_experts(work.decision, experts.count, form.filled)
    if work.params["part"] == "router":
        routing = form.routing(experts)
        for before, after in zip(_counting(experts), _counting(routing), strict=True):
            sources, targets = _stripes(experts, before), _stripes(routing, after)
            for slot, expert in enumerate(kept):
                work.copy(sources[expert], targets[slot])
        pad(work, form, experts)
        return {}
    slot = work.params["slot"]
    output = form.experts(experts)
    sources, targets = _blocks(experts, kept[slot], output), _blocks(output, slot, experts)
    for source, target in zip(sources, targets, strict=True):
        work.copy(source, target)
    return {"expert": kept[slot]}


def kept_experts(decision: Any, experts: int, count: int) -> list[int]:
    """The keep list of a layer's decision, with its invariants checked."""
    kept = [int(expert) for expert in decision["kept"]]
    if kept != sorted(set(kept)) or len(kept) != count or not set(kept) <= set(range(experts)):
        raise MoesurgError(f"planned to keep {count} of {experts} experts, decided on {kept}")
    return kept


def _check_types(model: Model, layer: Layer) -> None:
    experts = mixture(layer)
    for part in experts.layout.parts:
        kinds = [
            model.dtype(experts.region(expert, part).tensor) for expert in range(experts.count)
        ]
        for expert, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise InputError(
                    f"{model.folder}: layer {layer.index}: expert {expert}'s {part} is stored as "
                    f"{kind}, expert 0's as {kinds[0]}; which of them stay is not known in advance, so "
                    "their types must be the same"
                )


def _units(layer: Layer, form: Stored) -> Iterator[Unit]:
    experts = mixture(layer)
    routing, output = form.routing(experts), form.experts(experts)
    stripes = [
        stripe
        for name in _counting(routing)
        for stripe in _stripes(routing, name)[: form.real_rows]
    ]
    matrix = experts.hidden * experts.width
    yield Unit(
        f"layer.{layer.index}.router",
        "transform",
        layer.index,
        writes=(*stripes, *form.padding(experts)),
        params={"part": "router", "form": form.to_json()},
        memory=COPY_BUFFER + (12 * matrix if form.padded else 0),
    )
    for slot in range(form.filled):
        yield Unit(
            f"layer.{layer.index}.expert.{slot}",
            "transform",
            layer.index,
            writes=tuple(_blocks(output, slot, experts)),
            params={"part": "expert", "slot": slot, "form": form.to_json()},
        )


def _blocks(experts: Experts, expert: int, other: Experts) -> list[Region]:
    """Everything of an expert as contiguous blocks that the other side stores in the same order."""
    layout = experts.layout
    if layout.kind == "per-expert" or layout.kind != other.layout.kind:
        return list(experts.regions(expert).values())
    routing = layout.routing_shapes(experts.count, experts.hidden)
    shapes = layout.shapes(experts.count, experts.hidden, experts.width)
    return [
        Region(experts.prefix + name, shape).rows(expert, expert + 1)
        for name, shape in shapes.items()
        if name not in routing
    ]


def _counting(experts: Experts) -> list[str]:
    """The tensors of a mixture, below its prefix, that are no expert's: the router's."""
    return list(experts.layout.routing_shapes(experts.count, experts.hidden))


def _stripes(experts: Experts, name: str) -> list[Region]:
    """Each expert's entries of a tensor that counts experts: rows, or numbers of a vector stored as [E] or [1, E]."""
    shape = experts.layout.routing_shapes(experts.count, experts.hidden)[name]
    if shape[0] != experts.count:
        shape = (experts.count,)
    whole = Region(experts.prefix + name, shape)
    return [whole.rows(expert, expert + 1) for expert in range(experts.count)]
