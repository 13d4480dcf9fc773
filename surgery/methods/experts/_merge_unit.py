"""The units that all merging methods share: a router, a merged expert, or a layer that is solved for together.

A method decides groups; what is done with them is here. The order of averaged experts follows their representatives'
original order, so merging nothing writes the input's bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...plan import Unit
from .._mixture import mixture
from .._stored import Stored, pad, row_map
from ._average import average
from ._function import activation, gates, routed_output, stored
from ._groups import Grouping, check
from ._reconstruct import NewExpert, reconstruct, reconstruct_memory, row_weights

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer
    from ...checkpoint.region import Region
    from ...execute import Work


def merge_units(layer: Layer, form: Stored, params: dict[str, Any], sample: int) -> list[Unit]:
    """The units of a layer: its router and a unit for every merged expert, or one that solves for them together."""
    experts, output = mixture(layer), form.experts(mixture(layer))
    matrix, square = experts.hidden * experts.width, experts.width * experts.width
    # Reference and member in float32, sums in float64, and the assignment's scores twice.
    memory = 48 * matrix + 16 * square
    if experts.layout.transposed:
        # Reading gate or up brings in both, and strided parts wait for each other.
        memory += 24 * matrix
    if params.get("whiten"):
        memory += sample * (12 * experts.hidden + 12 * experts.width + 16 * experts.count)
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
            merged, metrics[f"group.{slot}"] = average(work, experts, grouping, slot)
            for expert in (member for member, found in slot_of.items() if found == slot):
                _write(work, output, expert, merged)
        return metrics
    (slot,) = work.params["slots"]
    merged, metrics[f"group.{slot}"] = average(work, experts, grouping, slot)
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
        sums, metrics[f"group.{slot}"] = average(work, experts, grouping, slot)
        gate, up = (
            stored(work.model, experts.region(0, name), sums[name]) for name in ("gate", "up")
        )
        merged.append(NewExpert(gate, up, sums["down"].float()))
    downs, metrics["reconstruction"] = reconstruct(
        rows_ND,
        target_ND,
        gates_NS,
        merged,
        act,
        weights_N=row_weights(work),
        **work.params["reconstruct"],
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
