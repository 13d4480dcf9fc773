"""Which stored matrices of a model an adapter's modules change, and the other way round.

A linear layer's module is its weight's name without ``.weight``. The experts of a mixture are one parameter of all
experts in stock transformers (``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F] of one module), which PEFT
targets as such: of two parameters of one module it wraps the first in the second, so ``gate_up_proj`` has the name of
the module with a final ``.base_layer`` and ``down_proj`` the module's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..architectures.linears import linears
from ..architectures.model import Model
from ..checkpoint.region import Region
from ..errors import InputError
from .adapter import PREFIX, Module

GATE_UP, DOWN = ".gate_up_proj", ".down_proj"


@dataclass(frozen=True)
class Target:
    """A module that an adapter can have.

    Attributes:
        name: as an adapter calls it.
        kind: ``linear`` or ``experts``.
        rows: for each expert (one for a linear layer) the stored matrices [out, in] that follow each other in the
            module's weight; gate and up are two.
        parameter: path of a targeted parameter; empty for a linear layer.
    """

    name: str
    kind: str
    rows: tuple[tuple[Region, ...], ...]
    parameter: str = ""

    @property
    def outputs(self) -> int:
        return sum(region.shape[0] for region in self.rows[0])

    @property
    def inputs(self) -> int:
        return self.rows[0][0].shape[1]

    @property
    def regions(self) -> list[Region]:
        """All stored matrices."""
        return [region for row in self.rows for region in row]

    def module(self, rank: int) -> Module:
        """The module of an adapter with this rank and scale 1."""
        experts, kind = len(self.rows), self.kind
        names = [f"{PREFIX}{self.name}.lora_{part}.weight" for part in "AB"]
        down = Region(names[0], (experts * rank, self.inputs))
        up = Region(names[1], (self.outputs, rank * experts))
        return Module(
            self.name,
            "experts" if kind == "experts" else "linear",
            down,
            up,
            None,
            rank,
            1.0,
            experts,
        )


def targets(model: Model) -> Iterator[Target]:
    """Every linear layer of the decoder blocks, and the experts of every mixture.

    Raises:
        InputError: experts that stock transformers holds in a way that adapters are not known for.
    """
    for linear in linears(model):
        if linear.expert is None and linear.region.contiguous:
            name = linear.region.tensor
            if not name.endswith(".weight"):
                continue
            yield Target(name.removesuffix(".weight"), "linear", ((linear.region,),))
    for layer in model.moe_layers:
        experts = layer.experts
        if experts is None:
            continue
        stock = experts.stock
        if stock.transposed or "gate_up" not in stock.names or len(experts.regions(0)) != 3:
            raise InputError(
                f"{model.folder}: the experts of {model.family.model_type} are stored or computed in a way that "
                "adapters of stacked experts are not supported for"
            )
        owner = (layer.prefix + stock.names["down"]).removesuffix(DOWN)
        count = range(experts.count)
        pairs = tuple((experts.region(e, "gate"), experts.region(e, "up")) for e in count)
        downs = tuple((experts.region(e, "down"),) for e in count)
        short = stock.names["down"].removesuffix(DOWN)
        yield Target(f"{owner}.base_layer", "experts", pairs, short + GATE_UP)
        yield Target(owner, "experts", downs, short + DOWN)
