"""Experts of custom outputs as the stock class's fused tensors: those of low rank, and ternary ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from ._expand import Piece, fits, stored

if TYPE_CHECKING:
    import torch

    from ...architectures.layouts import ExpertLayout
    from ...custom import CustomModel
    from ...execute import Work

LOWRANK, TERNARY = "moesurg_lowrank_experts", "moesurg_ternary_experts"
"""Keys of the config, as in `modeling/`, whose files import torch."""
FULL = -1


def lowrank(model: CustomModel, entry: Mapping[str, Any]) -> Iterator[Piece]:
    """Base plus change of every expert (`modeling/moesurg_lowrank_experts.py`)."""
    layout = _layout(model, entry)
    for index, ranks in entry["ranks"].items():
        prefix, place = _place(model, entry, index)
        base = {part: stored(model, f"{place}.base.{part}_proj.weight") for part in PROJECTIONS}
        reads: dict[tuple[int, str], Sequence[Region]] = {}
        for expert, rank in enumerate(ranks):
            for part in PROJECTIONS:
                name = f"{place}.{expert}.{part}_proj"
                if rank == FULL:
                    reads[expert, part] = [stored(model, f"{name}.weight")]
                elif rank:
                    factors = [stored(model, f"{name}_{leaf}.weight") for leaf in "ab"]
                    for found, axis in zip(factors, (0, 1), strict=True):
                        fits(model, found.tensor, found=found.shape[axis], expected=rank)
                    reads[expert, part] = [base[part], *factors]
                else:
                    reads[expert, part] = [base[part]]
        width, hidden = base["gate"].shape
        yield _piece(
            model, layout, int(index), prefix, reads, (len(ranks), hidden, width), "change"
        )


def ternary(model: CustomModel, entry: Mapping[str, Any]) -> Iterator[Piece]:
    """Scale times codes of every expert (`modeling/moesurg_ternary_experts.py`)."""
    layout = _layout(model, entry)
    if entry.get("int8"):
        raise InputError(
            f"{model.folder}: its ternary experts round what they are given to 8 bits, which no stock class does",
            hint="upcycle --method ternary --form dense writes stock weights",
        )
    for index in entry["layers"]:
        prefix, place = _place(model, entry, index)
        reads: dict[tuple[int, str], Sequence[Region]] = {}
        shapes = {}
        for part in PROJECTIONS:
            codes = stored(model, f"{place}.{part}_codes", axes=3)
            scale = stored(model, f"{place}.{part}_scale", axes=1)
            shapes[part] = codes.shape
            fits(model, scale.tensor, found=scale.shape[0], expected=codes.shape[0])
            for expert in range(codes.shape[0]):
                rows = codes.rows(expert, expert + 1)
                reads[expert, part] = [rows, scale.rows(expert, expert + 1)]
        sizes = (shapes["gate"][0], shapes["down"][1], shapes["gate"][1])
        yield _piece(model, layout, int(index), prefix, reads, sizes, "ternary")


def multiplied(work: Work) -> torch.Tensor:
    """The matrix that a unit's reads stand for, float64."""
    from ...linalg.ternary import unpack

    first, *others = (work.read(region) for region in work.unit.reads)
    if work.params["form"] == "ternary":
        import torch

        (written,) = work.unit.writes
        codes = unpack(first[0].to(torch.uint8), written.shape[1])
        return codes.double() * others[0].double()
    if not others:
        return first.double()
    right, left = others
    return first.double() + left.double() @ right.double()


def _layout(model: CustomModel, entry: Mapping[str, Any]) -> ExpertLayout:
    moe = model.family.moe
    if moe is None or moe.stock.modules[1] != entry.get("experts"):
        raise InputError(
            f"{model.folder}: its config names no experts of {model.family.class_name}"
        )
    return moe.stock


def _place(model: CustomModel, entry: Mapping[str, Any], index: object) -> tuple[str, str]:
    prefix = model.family.prefix.format(layer=index)
    return prefix, prefix + str(entry["experts"])


def _piece(
    model: CustomModel,
    layout: ExpertLayout,
    index: int,
    prefix: str,
    reads: Mapping[tuple[int, str], Sequence[Region]],
    sizes: tuple[int, int, int],
    form: str,
) -> Piece:
    experts, hidden, width = sizes
    counted = layout.routing_shapes(experts, hidden)
    # Of codes and scales the scale has the model's type, of matrices every one.
    kind = model.checkpoint.tensors[reads[0, "gate"][-1].tensor].dtype
    specs = [
        TensorSpec(prefix + name, kind, shape)
        for name, shape in layout.shapes(experts, hidden, width).items()
        if name not in counted
    ]
    units = [
        Unit(
            f"layer.{index}.expert.{expert}.{part}",
            "transform",
            index,
            reads=tuple(regions),
            writes=(layout.region(prefix, expert, part, hidden, width),),
            params={"form": form},
            memory=40 * hidden * width,
        )
        for (expert, part), regions in reads.items()
    ]
    names = dict.fromkeys(region.tensor for regions in reads.values() for region in regions)
    return Piece(tuple(names), tuple(specs), tuple(units))
