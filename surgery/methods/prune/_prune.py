"""The machinery all pruning methods share: the plan of a mixture with fewer experts, and its bytes.

A method decides which experts of every layer stay. Their tensors, their rows of the router and their entries of
anything else that counts experts are moved byte for byte, in their original order; the config's counts change,
and nothing else does. For a softmax router the result is the original with the dropped experts' logits at minus
infinity before the softmax: where weights are not renormalised, those of the kept experts grow. Filling a router
row with large negative numbers is no such mask, since the sign of its logit depends on the input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...checkpoint.region import Region
from ...errors import InputError, MoesurgError, UsageError
from ...plan import COPY_BUFFER, Unit
from .._forms import ragged, uniform
from .._layers import layer_counts
from .._mixture import blocks, mixture, one_mixture, replaced
from .._stored import Stored, pad
from ..base import Draft, Exactness
from ..experts._function import activation, gates, require_plain, routed_output, stored
from ..experts._reconstruct import (
    NewExpert,
    SolveOptions,
    reconstruct,
    reconstruct_memory,
    reconstruct_params,
    row_weights,
)
from ._keep import check_counts, groups_of

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work
    from ..experts._function import Activation


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A layer on its sampled inputs, for those who change experts before they are reconstructed.

    Attributes:
        rows_ND: inputs, float32.
        before_NE: the original router's coefficients, float64, 0 where an expert is not selected.
        after_NS: those of the router of the kept experts.
        act: the gate's activation.
    """

    rows_ND: torch.Tensor
    before_NE: torch.Tensor
    after_NS: torch.Tensor
    act: Activation


Change = Callable[["Work", "Experts", list[int], Sampled, list[NewExpert]], dict[str, object]]
"""What changes kept experts in place (all lists in the order of kept experts) and returns metrics."""


def plan_prune(
    models: Sequence[Model],
    experts: int,
    options: SolveOptions | None = None,
    *,
    counts: Mapping[int, int] | None = None,
    params: Mapping[str, Any] | None = None,
) -> Draft:
    """A checkpoint with ``experts`` of the original experts in every layer.

    Args:
        options: of a method that reconstructs, or can.
        counts: experts by layer instead, where layers differ.
        params: what else the units that reconstruct a layer need to know.

    Raises:
        InputError: not one MoE, or a count its router cannot work with.
    """
    model = one_mixture(models, "pruning", "prune")
    if counts is None and options is not None:
        counts = layer_counts(model, options)
    if counts is None:
        check_counts(
            model.experts, experts, model.rule.top_k, groups_of(model), where=str(model.folder)
        )
    solve = {} if options is None else reconstruct_params(options)
    sample = 0
    if options is not None and (solve or options.budget == "global"):
        require_plain(model)
        sample = options.sample
    if solve:
        solve |= params or {}
    for layer in model.moe_layers:
        _check_types(model, layer)
    form = uniform(model, experts) if counts is None else ragged(model, counts)
    tensors, units = replaced(
        model, form.specs, lambda layer: _units(layer, form.of(layer), solve, sample)
    )
    all_kept = all(stored.filled == model.experts for stored in form.layers.values())
    exactness = Exactness("approximate", "tokens of dropped experts go to others")
    if all_kept:
        exactness = Exactness("bitwise", "every expert is kept")
        if solve:
            reason = "every expert is kept, and its down projection is solved for again"
            exactness = Exactness("exact", reason)
    notes = []
    if counts is None and model.experts % 8 == 0 and experts % 8:
        notes.append(
            f"{experts} experts divide by fewer devices than {model.experts}: expert-parallel serving "
            "often wants a multiple of 8"
        )
    return form.draft(tensors, units, exactness, notes, sample)


def need_text(draft: Draft, options: SolveOptions) -> Draft:
    """The draft of a method that sees no text, which needs some where it reconstructs or measures.

    Raises:
        UsageError: it would go from layer to layer and see nothing there.
    """
    if options.sequential and not draft.sample:
        raise UsageError(
            "--sequential changes nothing for a method that sees no text", hint="add --reconstruct"
        )
    return dataclasses.replace(draft, data="routed") if draft.sample else draft


def transform_prune(work: Work) -> dict[str, object]:
    """Move the kept experts, or what counts experts, to their places."""
    experts = mixture(work.model.layers[work.layer])
    form = Stored.from_json(work.params["form"])
    kept = kept_experts(work.decision, experts.count, form.filled)
    if work.params["part"] == "layer":
        return reconstructed(work)
    if work.params["part"] == "router":
        _route(work, experts, form, kept)
        return {}
    slot = work.params["slot"]
    output = form.experts(experts)
    sources, targets = _blocks(experts, kept[slot], output), _blocks(output, slot, experts)
    for source, target in zip(sources, targets, strict=True):
        work.copy(source, target)
    return {"expert": kept[slot]}


def reconstructed(work: Work, change: Change | None = None) -> dict[str, object]:
    """Write a whole layer with down projections that give the original layer's output again.

    The target is what the original mixture gives the sampled tokens, the coefficients are those of the router that the
    kept rows make; where nothing is changed before, the experts start as they were.
    """
    experts = mixture(work.model.layers[work.layer])
    form = Stored.from_json(work.params["form"])
    kept = kept_experts(work.decision, experts.count, form.filled)
    rows_ND, act = work.inputs(), activation(work.model)
    routing = [work.read(part) for part in experts.routing]
    before_NE = gates(work.model, rows_ND, routing)
    target_ND = work.targets()
    if target_ND is None:
        target_ND = routed_output(work, experts, rows_ND, before_NE, act)
    after_NS = gates(work.model, rows_ND, [values[kept] for values in routing])
    sampled = Sampled(rows_ND, before_NE, after_NS, act)
    found = []
    for expert in kept:
        places = {name: experts.region(expert, name) for name in PROJECTIONS}
        gate, up = (stored(work.model, places[n], work.read(places[n])) for n in ("gate", "up"))
        found.append(NewExpert(gate, up, work.read(places["down"]).float()))
    metrics = {} if change is None else change(work, experts, kept, sampled, found)
    downs, metrics["reconstruction"] = reconstruct(
        rows_ND,
        target_ND,
        sampled.after_NS,
        found,
        act,
        weights_N=row_weights(work),
        **work.params["reconstruct"],
    )
    _route(work, experts, form, kept)
    output = form.experts(experts)
    for slot, (new, down) in enumerate(zip(found, downs, strict=True)):
        for name, matrix in (("gate", new.gate), ("up", new.up), ("down", down)):
            work.write(output.region(slot, name), matrix)
    return {"experts": kept, **metrics}


def _route(work: Work, experts: Experts, form: Stored, kept: Sequence[int]) -> None:
    """Move the kept rows of the router and of whatever else counts experts, and pad."""
    routing = form.routing(experts)
    for before, after in zip(_counting(experts), _counting(routing), strict=True):
        sources, targets = _stripes(experts, before), _stripes(routing, after)
        for slot, expert in enumerate(kept):
            work.copy(sources[expert], targets[slot])
    pad(work, form, experts)


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


def _units(layer: Layer, form: Stored, solve: dict[str, Any], sample: int) -> Iterator[Unit]:
    experts = mixture(layer)
    routing, output = form.routing(experts), form.experts(experts)
    stripes = [
        stripe
        for name in _counting(routing)
        for stripe in _stripes(routing, name)[: form.real_rows]
    ]
    matrix = experts.hidden * experts.width
    if solve:
        # Beside the solution: one expert that is read, its activations and the coefficients before.
        reading = 24 * matrix + sample * (12 * experts.width + 16 * experts.count)
        blocks = [block for slot in range(form.filled) for block in _regions(output, slot)]
        yield Unit(
            f"layer.{layer.index}.experts",
            "transform",
            layer.index,
            writes=(*stripes, *form.padding(experts), *blocks),
            params={"part": "layer", "form": form.to_json(), **solve},
            memory=COPY_BUFFER + reading + reconstruct_memory(experts, form.filled, sample),
        )
        return
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


def _regions(experts: Experts, slot: int) -> list[Region]:
    return [experts.region(slot, name) for name in PROJECTIONS]


def _blocks(experts: Experts, expert: int, other: Experts) -> list[Region]:
    """Everything of an expert as contiguous blocks that the other side stores in the same order."""
    if experts.layout.kind != other.layout.kind:
        return list(experts.regions(expert).values())
    return blocks(experts, expert)


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
