"""MoE++'s router (arXiv:2410.07348): two layers, and a residual from the logits of the mixture before.

    logits_l = B tanh(A x) + M logits_{l-1}    A [8 E, D], B [E, 8 E], M [E, E] over all E rows, new ones included

MoE++ trains from nothing. Here the mixture has a linear router W already, which the two layers begin as:

    A = [2^-8 W; N(0, std^2)]    B = [2^8 I | 0]    M = 0

With logits z = W x that gives 2^8 tanh(2^-8 z) = z - z^3 / (3 * 2^16) + ..., so logits of 10 are off by half a
hundredth of themselves and smaller ones by less, and nothing rounds in storage. The other rows of A wait for B to be
trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from .._mixture import mixture
from ._rows import rows_unit

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

KEY = "moesurg_routers"
FACTOR = 8
"""Rows of A for each of the router's."""
SCALE = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Router:
    """The planned routers of a model.

    Attributes:
        layers: of the mixtures, in order.
        two_layer, residual: which of MoE++'s parts they have.
        std: of drawn rows.
    """

    layers: tuple[int, ...]
    two_layer: bool
    residual: bool
    std: float

    def config(self, experts: Experts) -> dict[str, object]:
        """What the model code is told; ``experts`` has all rows of the router."""
        return {
            "layers": list(self.layers),
            "router": experts.layout.router,
            "hidden": FACTOR * experts.count if self.two_layer else 0,
            "residual": self.residual,
        }

    def regions(self, layer: Layer, experts: Experts) -> list[Region]:
        """The router's weight and, of two layers, A."""
        rows, hidden = experts.count, experts.hidden
        columns = FACTOR * rows if self.two_layer else hidden
        if self.residual and layer.index != self.layers[0]:
            columns += rows
        found = [Region(experts.router.tensor, (rows, columns))]
        if self.two_layer:
            name = f"{experts.router.tensor.rpartition('.')[0]}.first"
            found.append(Region(name, (FACTOR * rows, hidden)))
        return found

    def specs(self, model: Model, layer: Layer, experts: Experts) -> Iterator[TensorSpec]:
        """Of `regions`, in the type of the original's router."""
        dtype = model.dtype(mixture(layer).router.tensor)
        for region in self.regions(layer, experts):
            yield TensorSpec(region.tensor, dtype, region.shape)

    def units(
        self, layer: Layer, before: Experts, after: Experts, *, barred: bool
    ) -> Iterator[Unit]:
        """That write it, but for what experts of the original have beside rows."""
        writes = tuple(self.regions(layer, after))
        yield Unit(
            f"layer.{layer.index}.router",
            "transform",
            layer.index,
            reads=(before.router,),
            writes=writes,
            params={"part": "moepp", "two_layer": self.two_layer, "std": self.std},
            memory=24 * sum(region.count for region in writes),
        )
        if after.routing[1:]:
            unit = rows_unit(layer, after, kind="zero", std=self.std, barred=barred)
            yield dataclasses.replace(unit, reads=unit.reads[1:], writes=unit.writes[1:])


def check(model: Model) -> None:
    """Refuse families whose router is not a plain linear layer.

    Raises:
        InputError: its router has a bias of its own.
    """
    layer = model.moe_layers[0]
    if layer.experts is not None and layer.experts.router_bias is not None:
        raise InputError(
            f"{model.folder}: routers of {model.family.model_type} add a bias to their logits, which MoE++'s have not"
        )


def fill(work: Work) -> dict[str, object]:
    """Run the unit that writes a router."""
    import torch

    (old,), (weight, *first) = work.unit.reads, work.unit.writes
    rows, hidden = weight.shape[0], old.shape[1]
    linear_ED = torch.zeros(rows, hidden)
    linear_ED[: old.shape[0]] = work.read(old).float()
    # The rows that a linear router would have been given, drawn as there.
    drawn = work.rng("rows", work.layer).standard_normal(
        (rows - old.shape[0], hidden), dtype="float32"
    )
    linear_ED[old.shape[0] :] = torch.from_numpy(drawn) * work.params["std"]
    outer = torch.zeros(weight.shape)
    if not first:
        outer[:, :hidden] = linear_ED
        work.write(weight, outer)
        return {}
    outer[:, :rows].fill_diagonal_(1 / SCALE)
    drawn = work.rng("first", work.layer).standard_normal(first[0].shape, dtype="float32")
    inner = torch.from_numpy(drawn) * work.params["std"]
    inner[:rows] = SCALE * linear_ED
    work.write(weight, outer)
    work.write(first[0], inner)
    return {}
