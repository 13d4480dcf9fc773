"""The planned output of methods that replace single matrices: linear layers, and those of experts one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...modeling import custom_config, files
from ...plan import Unit, copy_unit
from .._mixture import mixture
from . import _expert_form as form_of_experts
from ._entries import LOWRANK, Entry, Shape, leaves

if TYPE_CHECKING:
    from ...architectures.linears import Linear
    from ...architectures.model import Layer, Model
    from ._expert_form import Moves

LINEARS, MIXED = "moesurg_linears", "moesurg_mixed_linears"
"""Keys of the config, as in `modeling/`, whose files import torch."""


@dataclass(frozen=True)
class Cut:
    """A matrix and what replaces it.

    Attributes:
        linear: the matrix.
        entry: its form and sizes.
        params: what its unit needs to know; ``module``, ``input`` and ``dtype`` are added.
        memory: bytes that its unit holds at its peak.
    """

    linear: Linear
    entry: Entry
    params: Mapping[str, Any]
    memory: int


@dataclass(frozen=True)
class Replaced:
    """A planned output."""

    tensors: list[TensorSpec]
    units: list[Unit]
    config: dict[str, object]
    files: dict[str, bytes]


def shape_of(region: Region) -> Shape:
    """[out, in] of a matrix."""
    rows, columns = region.shape
    return rows, columns


def replace_matrices(model: Model, cuts: Sequence[Cut], *, form: str) -> Replaced:
    """The model with some of its matrices replaced, one unit a matrix, and everything else copied.

    Args:
        form: what the user calls it; ``dense`` writes matrices of the shape they had.

    Raises:
        InputError: experts of a layer that would be stored differently, or that model code cannot stand for.
    """
    custom = form != "dense"
    plan = _Plan(model, cuts, form)
    at_start = {
        mixture(layer).names[0]: layer for layer in model.moe_layers if custom and layer.experts
    }
    held = {name for layer in at_start.values() for name in mixture(layer).names}
    for name in model.names():
        if name in at_start:
            plan.mixture(at_start[name])
        if name not in held:
            plan.tensor(name, custom)
    return plan.finish(custom)


class _Plan:
    """An output in the making."""

    def __init__(self, model: Model, cuts: Sequence[Cut], form: str) -> None:
        self.model, self.cuts, self.form = model, cuts, form
        self.owner = {name: layer.index for layer in model.layers for name in layer.names}
        self.by_tensor: dict[str, list[Cut]] = {}
        self.by_layer: dict[int, list[Cut]] = {}
        for cut in cuts:
            self.by_tensor.setdefault(cut.linear.region.tensor, []).append(cut)
            if cut.linear.expert is not None:
                self.by_layer.setdefault(cut.linear.layer, []).append(cut)
        self.tensors: list[TensorSpec] = []
        self.units: list[Unit] = []
        self.passing: dict[int | None, Moves] = {}
        self.experts: dict[int, form_of_experts.Entries] = {}

    def tensor(self, name: str, custom: bool) -> None:
        """A stored tensor that is no custom mixture's, with the matrices in it that are replaced."""
        whole, dtype = self.model.whole(name), self.model.dtype(name)
        here = self.by_tensor.get(name, [])
        module = name.removesuffix(".weight")
        if not (here and custom):
            self.tensors.append(TensorSpec(name, dtype, whole.shape))
        for cut in here:
            writes: tuple[Region, ...] = (dataclasses.replace(cut.linear.region, source=0),)
            if custom:
                if (
                    cut.entry["form"] not in LOWRANK
                    and f"{module}.bias" in self.model.checkpoint.tensors
                ):
                    # The bias keeps its name, so that the parts' go one level down.
                    module += ".layer"
                made = [
                    TensorSpec(f"{module}.{leaf}", kind or dtype, held)
                    for leaf, kind, held in leaves(cut.entry, shape_of(cut.linear.region))
                ]
                self.tensors.extend(made)
                writes = tuple(Region(spec.name, spec.shape) for spec in made)
            self._unit(cut, writes, module, dtype)
        rest = _rest(whole, [cut.linear for cut in here])
        self._pass(self.owner.get(name), [(region, [region]) for region in rest])

    def mixture(self, layer: Layer) -> None:
        """A layer's experts with the matrices that are replaced stacked by projection."""
        experts, here = mixture(layer), self.by_layer.get(layer.index, [])
        if not here:
            specs, moves = form_of_experts.untouched(self.model, layer)
            self.tensors.extend(specs)
            self._pass(layer.index, moves)
            return
        form_of_experts.check(self.model, layer, self.form)
        entries = {
            "gate": form_of_experts.WHOLE,
            "up": form_of_experts.WHOLE,
            "down": form_of_experts.WHOLE,
        }
        for part in entries:
            found = [cut for cut in here if cut.linear.role == part]
            if not found:
                continue
            entries[part] = dict(found[0].entry)
            if len(found) != experts.count or any(other.entry != found[0].entry for other in found):
                raise InputError(
                    f"{self.model.folder}: layer {layer.index}: --form {self.form} stores the {part} projections of "
                    "all experts in one tensor, so that all of them need one rank",
                    hint="give them one rank in --rank-plan, or use --form dense",
                )
        self.experts[layer.index] = entries
        self.tensors.extend(form_of_experts.specs(self.model, layer, entries))
        self._pass(layer.index, form_of_experts.moves(layer, entries))
        for cut in here:
            part, expert = cut.linear.role, cut.linear.expert or 0
            writes = tuple(
                form_of_experts.place(experts, part, expert, leaf)
                for leaf in form_of_experts.projection(experts, part, entries[part])
            )
            dtype = self.model.dtype(cut.linear.region.tensor)
            self._unit(cut, writes, form_of_experts.module(experts, part), dtype)

    def finish(self, custom: bool) -> Replaced:
        """Everything, with what is copied."""
        for index, moves in self.passing.items():
            if moves:
                label = "outer" if index is None else f"layer.{index}"
                self.units.append(copy_unit(f"{label}.unchanged", moves, layer=index))
        self.units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
        config = dict(self.model.config.raw)
        if not custom:
            return Replaced(self.tensors, self.units, config, {})
        family = self.model.family
        body = family.embedding.partition(".")[0] + "."
        config = custom_config(family, config)
        for cut in self.cuts:
            if cut.linear.expert is None:
                key = LINEARS if cut.entry["form"] in LOWRANK else MIXED
                listed: Any = config.setdefault(key, {})
                name = cut.linear.region.tensor.removeprefix(body).removesuffix(".weight")
                listed[name] = dict(cut.entry)
        if self.experts:
            config[form_of_experts.KEY] = form_of_experts.config(self.model, self.experts)
        return Replaced(self.tensors, self.units, config, files())

    def _unit(self, cut: Cut, writes: tuple[Region, ...], module: str, dtype: str) -> None:
        linear = cut.linear
        facts = {"module": module, "input": linear.module, "dtype": dtype}
        self.units.append(
            Unit(
                linear.label,
                "transform",
                linear.layer,
                reads=(linear.region,),
                writes=writes,
                params={**cut.params, **facts},
                memory=cut.memory,
            )
        )

    def _pass(self, index: int | None, moves: Moves) -> None:
        self.passing.setdefault(index, []).extend(moves)


def _rest(whole: Region, parts: Sequence[Linear]) -> list[Region]:
    """What of a tensor no unit transforms: all of it, nothing, or flat stretches between fused matrices."""
    if not parts:
        return [whole]
    at, found = 0, []
    for region in sorted((linear.region for linear in parts), key=lambda item: item.offset):
        if region.offset > at:
            found.append(Region(whole.tensor, (region.offset - at,), at))
        at = region.offset + region.count
    if at < whole.count:
        found.append(Region(whole.tensor, (whole.count - at,), at))
    return found
