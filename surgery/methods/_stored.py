"""How one layer's mixture of another number of experts is stored, and what a unit writes besides the experts.

`_forms.py` chooses among the ways for all layers of an output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..checkpoint.layout import TensorSpec
from ..checkpoint.region import Region
from ..errors import InputError

if TYPE_CHECKING:
    from ..architectures.model import Experts, Model
    from ..execute import Work

ROW_MAP = "moesurg_expert_of_row"
"""The same name as in `modeling/moesurg_mixtures.py`, which imports torch."""

NEVER = {"F16": -6e4}
"""A bias that no score comes near, where -1e9 is out of range."""


def never(dtype: str) -> float:
    """The bias of an expert that no token selects, in a stored type."""
    return NEVER.get(dtype, -1e9)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One layer's mixture in the output.

    Attributes:
        rows: entries of what decides the routing.
        slots: experts stored.
        filled: how many of them are experts; the others are padding.
        custom: stored under the names of the stock modules.
        mapped: a map from rows to experts is stored.
    """

    rows: int
    slots: int
    filled: int
    custom: bool = False
    mapped: bool = False

    @property
    def padded(self) -> bool:
        return self.filled < self.slots

    @property
    def real_rows(self) -> int:
        """Rows of the router that are not padding."""
        return self.rows - (self.slots - self.filled)

    def routing(self, experts: Experts) -> Experts:
        """Where the router and its biases go: use ``router`` and ``routing`` of it."""
        return self._as(experts, self.rows)

    def experts(self, experts: Experts) -> Experts:
        """Where experts go: use ``region`` and ``regions`` of it."""
        return self._as(experts, self.slots)

    def map(self, experts: Experts) -> Region | None:
        """Where a mapped layer's map goes, int32 [rows]."""
        if not self.mapped:
            return None
        place = experts.stock.modules[1]
        return Region(f"{experts.prefix}{place}.{ROW_MAP}", (self.rows,))

    def padding(self, experts: Experts) -> list[Region]:
        """What :func:`pad` writes: everything of the slots that are no experts."""
        output = self.experts(experts)
        found: list[Region] = []
        for slot in range(self.filled, self.slots):
            found.extend(whole.rows(slot, slot + 1) for whole in output.routing)
            found.extend(output.regions(slot).values())
        return found

    def specs(self, model: Model, experts: Experts) -> Iterator[TensorSpec]:
        """The layer's tensors; experts in the type of expert 0, which the caller has checked to be that of all."""
        routed = self.routing(experts)
        for before, after in zip(experts.routing, routed.routing, strict=True):
            layout = routed.layout
            shapes = layout.routing_shapes(self.rows, experts.hidden)
            shape = shapes[after.tensor.removeprefix(experts.prefix)]
            yield TensorSpec(after.tensor, model.dtype(before.tensor), shape)
        where = self.map(experts)
        if where is not None:
            yield TensorSpec(where.tensor, "I32", where.shape)
        output = self.experts(experts)
        shapes = output.layout.shapes(self.slots, experts.hidden, experts.width)
        found: dict[str, str] = {}
        for part, region in experts.regions(0).items():
            kind = model.dtype(region.tensor)
            for slot in range(self.slots):
                name = output.region(slot, part).tensor
                if found.setdefault(name, kind) != kind:
                    raise InputError(
                        f"{model.folder}: {region.tensor!r} is stored as {kind}, what shares {name!r} with it as "
                        f"{found[name]}",
                        hint="store all projections of the experts in one type first",
                    )
        for name, shape in shapes.items():
            full = experts.prefix + name
            if full in found:
                yield TensorSpec(full, found[full], shape)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Stored:
        return Stored(**data)

    def _as(self, experts: Experts, count: int) -> Experts:
        layout = experts.stock if self.custom else experts.layout
        return dataclasses.replace(experts, layout=layout, count=count)


def pad(work: Work, stored: Stored, experts: Experts) -> None:
    """Write the experts of zeros that no token selects, with rows of zeros and the lowest bias."""
    import torch

    output = stored.experts(experts)
    barred = output.correction or output.router_bias
    for region in stored.padding(experts):
        value = 0.0
        if barred is not None and region.tensor == barred.tensor:
            value = never(work.model.dtype(_read_name(experts, output, region)))
        work.write(region, torch.full(region.shape, value))


def row_map(work: Work, stored: Stored, experts: Experts, slot_of_row: list[int]) -> None:
    """Write which expert each row of the router means."""
    import torch

    where = stored.map(experts)
    if where is not None:
        work.write(where, torch.tensor(slot_of_row, dtype=torch.int32))


def _read_name(experts: Experts, output: Experts, region: Region) -> str:
    """The source's tensor that a routing region of the output was made from."""
    for before, after in zip(experts.routing, output.routing, strict=True):
        if after.tensor == region.tensor:
            return before.tensor
    return region.tensor
