"""Multiply the factors of a compressed output out: back to a stock model, at the size it had before.

An output of ``compress`` in any form but dense loads with the model code that lies beside it. This makes a
checkpoint of the stock class of it, for loaders and tools that know no other, and for methods that start from
stock models (merging, upcycling, pruning, another compression). Each matrix is

    W = B A                                            of two factors,
    W[pivots] = P,  W[others] = C P                    of pivot rows and coefficients,
    W[:, kept] = K,  W[:, others] = of low rank        of exact columns, or rows,
    W = C Q or Q^T C,  W = s * codes + B A             of cosine coefficients, and of integers with a residual,
    W_e = A_e S, S A_e, W_base + B_e A_e, A_e f(mix)   of experts with shared parts, or any of the above each,
    W_e = W_base + B_e A_e                             of experts stored as a base and changes of low rank,
    W_e = alpha_e * codes_e                            of ternary experts,

multiplied in float64 and rounded once to the type the factors are stored in. In float32 the logits are those of the
compressed model up to rounding; in half precision they differ by that one rounding, and by the roundings between two
factors, which a dense matrix does not have. Nothing that compression lost comes back. All other tensors are copied.

Router rows that share experts (``merge --router mapped``) get a copy of their expert each, byte for byte, which is what
``--router tied`` writes. Outputs whose layers differ from each other in ways no stock class can hold are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.model import Model
from ...checkpoint.header import TensorInfo
from ...checkpoint.layout import TensorSpec
from ...checkpoint.reader import Checkpoint
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, MethodInfo, option
from ._expand import Piece, expanded, layer_of, pieces

if TYPE_CHECKING:
    from ...custom import CustomModel
    from ...execute import Work

INFO = MethodInfo(
    summary="multiply low-rank factors out, back to a stock model",
    paper="",
    inputs="one output with model code of moesurg",
    data="none",
    takes="custom models",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    expand: bool = option(True, "multiply the factors out")


def plan(models: Sequence[CustomModel], options: Options) -> Draft:
    """The stock model that a custom one stands for.

    Raises:
        InputError: not one model, or one that no stock class can hold.
    """
    if len(models) != 1:
        raise InputError(f"expanding takes one model, {len(models)} were given")
    model = models[0]
    owner: dict[str, Piece] = {}
    for piece in pieces(model):
        owner.update(dict.fromkeys(piece.stored, piece))
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    passing: dict[int | None, list[Region]] = {}
    done: set[int] = set()
    body = model.family.embedding.partition(".")[0] + "."
    for name, info in model.checkpoint.tensors.items():
        found = owner.get(name)
        if found is None:
            tensors.append(TensorSpec(name, info.dtype, info.shape))
            index = layer_of(name.removeprefix(body))
            passing.setdefault(index, []).append(Region(name, info.shape))
        elif id(found) not in done:
            done.add(id(found))
            tensors.extend(found.specs)
            units.extend(found.units)
    for index, regions in passing.items():
        label = "outer" if index is None else f"layer.{index}"
        moves = [(region, [region]) for region in regions]
        units.append(copy_unit(f"{label}.unchanged", moves, layer=index))
    units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    _check(model, tensors)
    made = [unit for unit in units if unit.kind == "transform"]
    if all(unit.params["form"] == "mapped" for unit in made):
        exactness = Exactness("bitwise", "every row of the router gets a copy of its expert")
        return Draft(model.stock_config, tensors, units, exactness)
    kinds = {spec.dtype for piece in owner.values() for spec in piece.specs}
    why = "the products of the stored factors"
    exactness = Exactness("exact", why)
    if not kinds <= {"F32", "F64"}:
        rounded = ", ".join(sorted(kinds))
        exactness = Exactness("approximate", f"{why}, each rounded once to {rounded}")
    return Draft(
        model.stock_config,
        tensors,
        units,
        exactness,
        notes=[f"{len(units) - len(passing)} matrices are multiplied out"],
    )


def transform(work: Work) -> dict[str, object]:
    """Multiply one matrix out."""
    (written,) = work.unit.writes
    work.write(written, expanded(work))
    return {}


def _check(model: CustomModel, tensors: Sequence[TensorSpec]) -> None:
    """Refuse what would not be a complete stock model, as opening it would."""
    held = {
        spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, model.folder, 0, spec.nbytes)
        for spec in tensors
    }
    Model(Checkpoint(model.folder, model.stock_config, held, ()))
