"""The machinery all merging methods share: plan of a smaller mixture, averaging of groups, router rows.

A method decides groups; what is done with them is here. The order of averaged experts follows their
representatives' original order, so merging nothing writes the input's bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...errors import InputError
from ...plan import Unit
from .._forms import Form, Stored, check_expert_types, mapped, pad, ragged, row_map, uniform
from .._layers import LayerOptions, layer_counts
from .._mixture import mixture, one_mixture, prediction_notes, replaced
from ..base import Draft, Exactness
from ._function import activation, gates, hidden, require_plain, routed_output, stored
from ._groups import Grouping, check
from ._least_squares import fit_down
from ._reconstruct import NewExpert, reconstruct, reconstruct_memory

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...checkpoint.region import Region
    from ...execute import Work
    from ...linalg.permutation import Alignment

ROUTERS = ("keep", "mean", "tied", "mapped")
ROUTER_HELP = (
    "keep: each merged expert keeps its representative's router row; mean: the rows are averaged like the "
    "experts; tied: all rows stay and every slot of a group holds the merged expert, which reproduces the "
    "papers' summed gates but writes a folder as large as the input; mapped: the same function, each merged "
    "expert stored once, in a folder that loads with its own model code"
)


def plan_merge(
    models: Sequence[Model],
    options: LayerOptions,
    *,
    router: str,
    params: dict[str, Any],
    sample: int = 0,
    counts: Mapping[int, int] | None = None,
) -> Draft:
    """A checkpoint with ``experts`` merged experts per layer (or all slots, for a tied router).

    Args:
        models: exactly one mixture.
        options: the number of groups per layer, and how layers differ.
        router: one of ROUTERS.
        params: what the transform needs to know, the same for every unit. Read here and below: ``router``;
            ``align`` (``none``, ``weight``; in REAM's matching also ``activation`` and ``both``) and
            ``reference`` (``first`` expert of the layer or the group's ``representative``); ``matching``
            (``ream`` for normalised distances); ``rank``; ``factors`` (``rank``, ``keep_rows`` and ``refits``
            of a low-rank and row-sparse approximation); ``combine`` (``least-squares`` and its
            ``combine_ridge``); ``reconstruct`` (see ``_reconstruct.py``), which makes a layer one unit.
        sample: rows of each mixture's input that the transform reads.
        counts: experts by layer instead of ``experts`` in each, where layers differ.

    Raises:
        InputError: not one MoE, more experts than there are, or fewer than the router selects.
    """
    model, experts = one_mixture(models, "merging", "merge"), options.experts
    scheduled = layer_counts(model, options)
    counts = scheduled if counts is None else counts
    if options.budget == "global":
        sample = max(sample, options.sample)
    if not 1 <= experts <= model.experts:
        raise InputError(
            f"{model.folder}: --experts {experts} asked for, the model has {model.experts} per layer"
        )
    if experts < model.rule.top_k:
        raise InputError(
            f"{model.folder}: --experts {experts} is fewer than the {model.rule.top_k} experts "
            "each token selects",
            hint=f"use --experts {model.rule.top_k} or more",
        )
    computes = (
        params.get("reconstruct") or params.get("combine") or params.get("matching") == "ream"
    )
    if computes or options.budget == "global":
        require_plain(model)
    placed = router in ("tied", "mapped")
    if model.rule.groups > 1 and not placed and experts != model.experts:
        raise InputError(
            f"{model.folder}: tokens select experts within {model.rule.groups} groups, and merging would move "
            "experts from one group to another",
            hint="--router tied or mapped keeps every expert's place",
        )
    if not placed and experts < model.rule.least_experts:
        raise InputError(
            f"{model.folder}: the router of {model.family.model_type} needs at least "
            f"{model.rule.least_experts} experts, --experts {experts} asked for"
        )
    for layer in model.moe_layers:
        check_expert_types(model, layer)
    form = _form(model, router, counts or {layer.index: experts for layer in model.moe_layers})
    tensors, units = replaced(
        model, form.specs, lambda layer: _merge_units(layer, form.of(layer), params, sample)
    )
    notes = [*prediction_notes(model), *form.note()]
    if router == "tied":
        notes.append(
            f"the router keeps its {model.experts} rows, so every merged expert is written once for "
            "each of its members and the output is as large as the input"
        )
    exactness = Exactness("approximate", "different experts are averaged")
    if experts == model.experts and counts is None:
        exactness = Exactness("bitwise", "every expert is a group of its own")
        if params.get("reconstruct"):
            reason = "every expert is a group of its own, whose down projection is solved for again"
            exactness = Exactness("exact", reason)
    return Draft(
        form.config(),
        tensors,
        units,
        exactness,
        tier=form.tier,
        notes=notes,
        sample=sample,
        files=form.files(),
    )


def decided_counts(decisions: Mapping[str, Any]) -> dict[int, int]:
    """Groups of every layer, for the ``settle`` of a method that lets layers differ."""
    return {int(index): len(decided["groups"]) for index, decided in decisions.items()}


def undecided(draft: Draft) -> Draft:
    """A draft for which ``settle`` will find other numbers in every layer."""
    note = (
        "the text decides how many experts each layer keeps; where they differ, the output is padded for stock classes "
        "if that is exact, and brings its own model code if not"
    )
    return dataclasses.replace(draft, notes=[*draft.notes, note])


def _form(model: Model, router: str, counts: Mapping[int, int]) -> Form:
    if router == "mapped":
        return mapped(model, counts)
    if router == "tied":
        return uniform(model, model.experts)
    if len(set(counts.values())) == 1:
        return uniform(model, next(iter(counts.values())))
    return ragged(model, counts)


def _merge_units(layer: Layer, form: Stored, params: dict[str, Any], sample: int) -> list[Unit]:
    experts, output = mixture(layer), form.experts(mixture(layer))
    matrix, square = experts.hidden * experts.width, experts.width * experts.width
    # Reference and member in float32, sums in float64, and the assignment's scores twice.
    memory = 48 * matrix + 16 * square
    if experts.layout.transposed:
        # Reading gate or up brings in both, and strided parts wait for each other.
        memory += 24 * matrix
    if params.get("rank"):
        memory += 24 * max(experts.hidden, experts.width) ** 2
    if params.get("factors"):
        memory += 48 * matrix + 40 * min(experts.hidden, experts.width) ** 2
    if params.get("matching") == "ream":
        memory += 24 * matrix + 32 * square + 16 * sample * experts.width
    if params.get("combine"):
        memory += reconstruct_memory(experts, 1, sample)
    found = {**params, "form": form.to_json()}
    routing = _routing_regions(form, experts)
    if params.get("reconstruct"):
        memory += reconstruct_memory(experts, form.filled, sample)
        regions = [*routing, *_expert_regions(output, range(form.filled))]
        params = {**found, "part": "layer"}
        name = f"layer.{layer.index}.experts"
        return [
            Unit(
                name, "transform", layer.index, writes=tuple(regions), params=params, memory=memory
            )
        ]
    router = Unit(
        f"layer.{layer.index}.router",
        "transform",
        layer.index,
        writes=tuple(routing),
        params={**found, "part": "router"},
        memory=8 * experts.count * experts.hidden + (12 * matrix if form.padded else 0),
    )
    if params["router"] == "tied":
        slots: list[tuple[str, list[int]]] = [("experts", list(range(form.slots)))]
    else:
        slots = [(f"expert.{slot}", [slot]) for slot in range(form.filled)]
    units = [router]
    for label, written in slots:
        units.append(
            Unit(
                f"layer.{layer.index}.{label}",
                "transform",
                layer.index,
                writes=tuple(_expert_regions(output, written)),
                params={**found, "part": "experts", "slots": written},
                memory=memory,
            )
        )
    return units


def _routing_regions(form: Stored, experts: Experts) -> list[Region]:
    """What decides the routing in the output: rows of real experts, the map if there is one, padding."""
    found = [region.rows(0, form.real_rows) for region in form.routing(experts).routing]
    where = form.map(experts)
    return [*found, *([] if where is None else [where]), *form.padding(experts)]


def _expert_regions(output: Experts, slots: Iterable[int]) -> list[Region]:
    return [region for slot in slots for region in output.regions(slot).values()]


def transform_merge(work: Work) -> dict[str, object]:
    """Write the router's rows or the merged experts of the unit."""
    experts = mixture(work.model.layers[work.layer])
    form = Stored.from_json(work.params["form"])
    output = form.experts(experts)
    tied = work.params["router"] == "tied"
    grouping = check(work.decision, experts.count, None if tied else form.filled)
    if work.params["part"] == "router":
        rows = [
            _router_rows(work.read(r), grouping, work.params["router"]) for r in experts.routing
        ]
        _write_routing(work, form, experts, grouping, rows)
        return {}
    if work.params["part"] == "layer":
        return _reconstructed(work, form, experts, grouping)
    slot_of = grouping.slot_of()
    metrics: dict[str, object] = {}
    if tied:
        for slot in range(len(grouping.groups)):
            merged, metrics[f"group.{slot}"] = _average(work, experts, grouping, slot)
            for expert in (member for member, found in slot_of.items() if found == slot):
                _write(work, output, expert, merged)
        return metrics
    (slot,) = work.params["slots"]
    merged, metrics[f"group.{slot}"] = _average(work, experts, grouping, slot)
    _write(work, output, slot, merged)
    return metrics


def _write_routing(
    work: Work, form: Stored, experts: Experts, grouping: Grouping, rows: Sequence[torch.Tensor]
) -> None:
    """Write rows (and biases) of the router, the map from rows to experts, and padding."""
    for written, values in zip(form.routing(experts).routing, rows, strict=True):
        work.write(written.rows(0, form.real_rows), values)
    slot_of = grouping.slot_of()
    row_map(work, form, experts, [slot_of[expert] for expert in range(experts.count)])
    pad(work, form, experts)


def _reconstructed(
    work: Work, form: Stored, experts: Experts, grouping: Grouping
) -> dict[str, object]:
    """Merge a whole layer, solve its down projections together, and write it."""
    import torch

    rows_ND, act = work.inputs(), activation(work.model)
    routing = [work.read(part) for part in experts.routing]
    kept = [
        stored(work.model, part, _router_rows(values, grouping, work.params["router"]))
        for part, values in zip(experts.routing, routing, strict=True)
    ]
    target_ND = work.targets()
    if target_ND is None:
        before_NE = gates(work.model, rows_ND, routing)
        target_ND = routed_output(work, experts, rows_ND, before_NE, act)
    gates_NS = gates(work.model, rows_ND, kept)
    places = [[slot] for slot in range(len(grouping.groups))]
    if work.params["router"] in ("tied", "mapped"):
        # Every member's row means the merged expert, so what a token gives the members adds up.
        members_of = [list(group) for group in grouping.groups]
        gates_NS = torch.stack([gates_NS[:, members].sum(1) for members in members_of], dim=1)
        if work.params["router"] == "tied":
            places = members_of
    metrics: dict[str, object] = {}
    merged = []
    for slot in range(len(grouping.groups)):
        sums, metrics[f"group.{slot}"] = _average(work, experts, grouping, slot)
        gate, up = (
            stored(work.model, experts.region(0, name), sums[name]) for name in ("gate", "up")
        )
        merged.append(NewExpert(gate, up, sums["down"].float()))
    downs, metrics["reconstruction"] = reconstruct(
        rows_ND, target_ND, gates_NS, merged, act, **work.params["reconstruct"]
    )
    _write_routing(work, form, experts, grouping, kept)
    output = form.experts(experts)
    for expert, down, slots in zip(merged, downs, places, strict=True):
        for slot in slots:
            _write(work, output, slot, {"gate": expert.gate, "up": expert.up, "down": down})
    return metrics


def _write(work: Work, output: Experts, slot: int, merged: dict[str, torch.Tensor]) -> None:
    for projection, matrix in merged.items():
        work.write(output.region(slot, projection), matrix)


def _router_rows(rows_ED: torch.Tensor, grouping: Grouping, router: str) -> torch.Tensor:
    """One row a group, of the router's weight [E, D] or of a bias [E]."""
    import torch

    if router in ("tied", "mapped"):
        return rows_ED
    if router == "keep":
        return rows_ED[list(grouping.representatives)]
    merged = []
    for group, weights in zip(grouping.groups, grouping.weights, strict=True):
        share = torch.tensor(weights, dtype=torch.float64)
        merged.append(share @ rows_ED[list(group)].double())
    return torch.stack(merged)


def _average(
    work: Work, experts: Experts, grouping: Grouping, slot: int
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The weighted mean of a group, in float64, members read one at a time.

    Returns the merged projections and, per projection, the spread: the root of the weighted mean squared
    distance of the members from their mean, relative to their root mean square.
    """
    import torch

    from ...linalg.svd import leading_left

    members, weights = grouping.groups[slot], grouping.weights[slot]
    aligned = work.params.get("align", "none") != "none" and len(members) > 1
    rank = work.params.get("rank")
    anchor = (
        0 if work.params.get("reference", "first") == "first" else grouping.representatives[slot]
    )
    match = _matcher(work, experts, anchor) if aligned else None
    sums: dict[str, torch.Tensor] = {}
    squares = dict.fromkeys(experts.layout.parts, 0.0)
    grams: dict[str, torch.Tensor] = {}
    matching: list[dict[str, float]] = []
    for member, weight in zip(members, weights, strict=True):
        matrices = _read(work, experts, member)
        if match is not None and member != anchor:
            found = match(matrices)
            matching.append({"expert": member, "before": found.before, "after": found.after})
            matrices = _reordered(matrices, found.order_F)
        for projection, matrix in matrices.items():
            wide = matrix.double()
            squares[projection] += weight * float(torch.linalg.vector_norm(wide)) ** 2
            if projection in sums:
                sums[projection].add_(wide, alpha=weight)
            else:
                sums[projection] = wide * weight
            if rank and projection in PROJECTIONS:
                gram = wide @ wide.T
                grams[projection] = grams[projection] + gram if projection in grams else gram
    metrics: dict[str, object] = {"members": list(members), "weights": list(weights)}
    if matching:
        metrics["alignment"] = matching
    spread, truncation = {}, {}
    for projection, mean in sums.items():
        variance = squares[projection] - float(torch.linalg.vector_norm(mean)) ** 2
        spread[projection] = (max(0.0, variance) / max(squares[projection], 1e-300)) ** 0.5
        if rank and projection in PROJECTIONS:
            basis_OR = leading_left(grams[projection], rank)
            projected = basis_OR @ (basis_OR.T @ mean)
            lost = float((projected - mean).norm() / mean.norm().clamp_min(1e-300))
            truncation[projection] = lost
            sums[projection] = projected
    metrics["spread"] = spread
    if truncation:
        metrics["truncation"] = truncation
    if work.params.get("factors"):
        metrics["factors"] = _factor(sums, **work.params["factors"])
    if work.params.get("combine") == "least-squares" and len(members) > 1:
        metrics["least_squares"] = fit_down(work, experts, members, weights, sums)
    return sums, metrics


def _factor(
    sums: dict[str, torch.Tensor], *, rank: int, keep_rows: float, refits: int
) -> dict[str, float]:
    """Approximate each projection in place; returns the relative errors."""
    from ...linalg.row_sparse import split

    errors = {}
    for projection in (name for name in PROJECTIONS if name in sums):
        matrix = sums[projection]
        found = split(matrix, rank, int(keep_rows * len(matrix)), refits)
        sums[projection], errors[projection] = found.matrix_MN, found.error
    return errors


def _matcher(
    work: Work, experts: Experts, anchor: int
) -> Callable[[dict[str, torch.Tensor]], Alignment]:
    """What finds the permutation of an expert's neurons that brings it closest to expert ``anchor``."""
    from ...linalg.neuron_distance import align_normalised
    from ...linalg.permutation import align

    reference = _read(work, experts, anchor)
    if work.params.get("matching") != "ream":
        return lambda matrices: align(_triple(reference), _triple(matrices))
    kind = work.params["align"]
    if kind == "weight":
        return lambda matrices: align_normalised(
            _triple(reference), _triple(matrices), weights=True, activations=None
        )
    act, rows_ND = activation(work.model), work.inputs()
    anchored_NF = hidden(rows_ND, reference["gate"], reference["up"], act)
    return lambda matrices: align_normalised(
        _triple(reference),
        _triple(matrices),
        weights=kind == "both",
        activations=(anchored_NF, hidden(rows_ND, matrices["gate"], matrices["up"], act)),
    )


def _read(work: Work, experts: Experts, expert: int) -> dict[str, torch.Tensor]:
    return {projection: work.read(region) for projection, region in experts.regions(expert).items()}


def _reordered(matrices: dict[str, torch.Tensor], order_F: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same expert with its neurons in another order; the bias of down belongs to none of them."""
    found = {part: matrix[order_F] for part, matrix in matrices.items() if "down" not in part}
    found["down"] = matrices["down"][:, order_F]
    if "down_bias" in matrices:
        found["down_bias"] = matrices["down_bias"]
    return found


def _triple(
    matrices: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return matrices["gate"], matrices["up"], matrices["down"]
