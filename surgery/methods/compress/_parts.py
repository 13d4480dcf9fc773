"""Planning and writing for methods that store a linear layer as parts of several kinds.

What a matrix is replaced by is an ``entry``: a JSON object with a ``form`` of `modeling/moesurg_mixed_linears.py` and
its sizes. One entry serves all matrices of a shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...checkpoint.dtypes import nbytes
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...modeling import custom_config, files
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness
from ._lowrank import _rest, _shape, choose

if TYPE_CHECKING:
    import torch

    from ...architectures.linears import Linear
    from ...architectures.model import Model
    from ...execute import Work

KEY = "moesurg_mixed_linears"
"""The same as in `modeling/moesurg_mixed_linears.py`, which imports torch."""

RATIO_HELP = "fraction of the targeted matrices' bytes to remove, above 0 and below 1"
FORMS = ("parts", "dense")
FORM_HELP = (
    "parts: as the method makes them, with model code; dense: a matrix as before, which saves nothing and loads as "
    "stock"
)

Shape = tuple[int, int]
Entry = Mapping[str, Any]
Leaf = tuple[str, str, tuple[int, ...]]
"""Name below the module, type and shape; an empty type stands for the matrix's own."""


def leaves(entry: Entry, shape: Shape) -> list[Leaf]:
    """The tensors that an entry stores for a matrix [out, in]."""
    rows, columns = shape
    form, rank = entry["form"], entry["rank"]
    if form in ("columns", "rows"):
        exact = entry["exact"]
        part = (rows, exact) if form == "columns" else (exact, columns)
        inner = (rows, columns - exact) if form == "columns" else (rows - exact, columns)
        name = form.removesuffix("s")
        return [
            *_lowrank(entry["lowrank"], inner, rank, "inner."),
            (f"{form}.weight", "", part),
            (f"{name}_index", "I32", (exact,)),
        ]
    if form == "cosine":
        size = (rows, rank) if entry["side"] == "input" else (rank, columns)
        return [("coefficients.weight", "", size), ("frequencies", "I32", (rank,))]
    bits, group = entry["bits"], entry["group"]
    found: list[Leaf] = [
        ("codes", "U8", (rows, -(-columns // (8 // bits)))),
        ("scales", "", (rows, -(-columns // group))),
    ]
    return [*found, *(_lowrank("factors", shape, rank, "") if rank else [])]


def _lowrank(form: str, shape: Shape, rank: int, prefix: str) -> list[Leaf]:
    rows, columns = shape
    if form == "factors":
        return [
            (f"{prefix}lowrank_A.weight", "", (rank, columns)),
            (f"{prefix}lowrank_B.weight", "", (rows, rank)),
        ]
    return [
        (f"{prefix}pivot_rows.weight", "", (rank, columns)),
        (f"{prefix}pivot_coef.weight", "", (rows - rank, rank)),
        (f"{prefix}pivot_index", "I32", (rank,)),
    ]


def size(entry: Entry, shape: Shape, dtype: str) -> int:
    """Bytes that an entry stores for a matrix of a type."""
    return sum(nbytes(kind or dtype, held) for _, kind, held in leaves(entry, shape))


def largest_rank(
    make: Callable[[int], Entry], top: int, shape: Shape, dtype: str, ratio: float
) -> int:
    """The largest rank up to ``top`` whose entry takes at most 1 - ratio of the matrix's bytes; -1 if none does."""
    budget = (1 - ratio) * nbytes(dtype, shape)
    low, high = -1, top
    while low < high:
        middle = (low + high + 1) // 2
        if size(make(middle), shape, dtype) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def plan_parts(
    models: Sequence[Model],
    *,
    form: str,
    ratio: float,
    targets: str,
    entry_of: Callable[[Shape, str], Entry | None],
    params: Mapping[str, Any],
    memory: int = 0,
) -> Draft:
    """The model with its targeted linear layers stored as parts, one unit a matrix.

    Args:
        entry_of: what replaces a matrix of a shape and type; None where it stays as it is.
        params: what the transform needs besides ``entry``.
        memory: bytes a unit needs beyond its matrix, for each of the matrix's numbers.

    Raises:
        InputError: not one model, a mixture with a form that stock experts cannot hold, or no matrix to replace.
        UsageError: an option out of range.
    """
    if len(models) != 1:
        raise InputError(f"compressing takes one model, {len(models)} were given")
    model = models[0]
    if not 0 < ratio < 1:
        raise UsageError(f"--ratio {ratio} should be above 0 and below 1")
    parts = form == "parts"
    if parts and model.is_moe:
        raise InputError(
            f"{model.folder}: --form parts is for dense models: the experts of stock {model.family.class_name} "
            "are fused tensors, which have no linear layer to replace",
            hint="use --form dense",
        )
    chosen = choose(model, targets)
    kinds = {(_shape(item.region), model.dtype(item.region.tensor)) for item in chosen}
    entries = {kind: entry_of(*kind) for kind in sorted(kinds)}
    cut: dict[str, tuple[Linear, Entry]] = {}
    before = after = 0
    for item in chosen:
        shape, dtype = _shape(item.region), model.dtype(item.region.tensor)
        entry, whole = entries[shape, dtype], nbytes(dtype, shape)
        before += whole
        after += whole if entry is None else size(entry, shape, dtype)
        if entry is not None:
            cut[item.label] = (item, entry)
    if not cut:
        raise InputError(
            f"{model.folder}: no targeted matrix can be stored with {ratio:.0%} fewer bytes",
            hint="use a smaller --ratio",
        )
    tensors, units = _output(model, cut, parts, params, memory)
    config = dict(model.config.raw)
    code: dict[str, bytes] = {}
    removed = f"{after:,} bytes instead of {before:,} ({1 - after / before:.1%} removed)"
    shapes = ", ".join(
        f"{rows}x{columns}: {entry['rank']}"
        for ((rows, columns), _), entry in entries.items()
        if entry is not None
    )
    notes = [f"ranks by shape: {shapes}"]
    if parts:
        config, code = _custom(model, cut)
        notes.append(f"the {len(chosen)} targeted matrices take {removed}")
        notes.append(
            "load it with trust_remote_code=True: AutoModelForCausalLM.from_pretrained(FOLDER, "
            "trust_remote_code=True)"
        )
    else:
        notes.append(f"the parts would take {removed}; the dense form stores all of them")
    left = len(chosen) - len(cut)
    if left:
        notes.append(f"{left} targeted matrices stay as they are, because nothing would be saved")
    why = f"{len(cut)} matrices are replaced by sums of simpler ones"
    return Draft(
        config,
        tensors,
        units,
        Exactness("approximate", why),
        tier="custom" if parts else "stock",
        notes=notes,
        files=code,
    )


def write_parts(
    work: Work, dense: torch.Tensor, tensors: Mapping[str, torch.Tensor]
) -> dict[str, object]:
    """Write a replaced matrix in the unit's form.

    Args:
        dense: what the parts stand for, float64.
        tensors: the parts, by name below the module.

    Returns:
        ``rank`` and the relative Frobenius ``error``.
    """
    import torch

    (region,) = work.unit.reads
    if work.params["parts"]:
        by_name = {where.tensor: where for where in work.unit.writes}
        for name, tensor in tensors.items():
            work.write(by_name[work.params["module"] + "." + name], tensor)
    else:
        work.write(work.unit.writes[0], dense)
    original = work.read(region).double()
    norm = float(torch.linalg.vector_norm(original))
    lost = float(torch.linalg.vector_norm(dense - original))
    return {"rank": work.params["entry"]["rank"], "error": lost / norm if norm else 0.0}


def _output(
    model: Model,
    cut: Mapping[str, tuple[Linear, Entry]],
    parts: bool,
    params: Mapping[str, Any],
    memory: int,
) -> tuple[list[TensorSpec], list[Unit]]:
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    owner = {name: layer.index for layer in model.layers for name in layer.names}
    here: dict[str, list[tuple[Linear, Entry]]] = {}
    for item, entry in cut.values():
        here.setdefault(item.region.tensor, []).append((item, entry))
    passing: dict[int | None, list[tuple[Region, Region]]] = {}
    for name in model.names():
        whole, dtype = model.whole(name), model.dtype(name)
        found = here.get(name, [])
        if not (found and parts):
            tensors.append(TensorSpec(name, dtype, whole.shape))
        module = name.removesuffix(".weight")
        if f"{module}.bias" in model.checkpoint.tensors:
            module += ".layer"
        for item, entry in found:
            rows, columns = shape = _shape(item.region)
            writes: tuple[Region, ...] = (dataclasses.replace(item.region, source=0),)
            if parts:
                specs = [
                    TensorSpec(f"{module}.{leaf}", kind or dtype, held)
                    for leaf, kind, held in leaves(entry, shape)
                ]
                tensors.extend(specs)
                writes = tuple(Region(spec.name, spec.shape) for spec in specs)
            units.append(
                Unit(
                    item.label,
                    "transform",
                    item.layer,
                    reads=(item.region,),
                    writes=writes,
                    params={
                        **params,
                        "parts": parts,
                        "entry": dict(entry),
                        "module": module,
                        "input": item.module,
                        "dtype": dtype,
                    },
                    memory=(64 + memory) * rows * columns + 32 * min(rows, columns) ** 2,
                )
            )
        rest = _rest(whole, [item for item, _ in found])
        passing.setdefault(owner.get(name), []).extend((region, region) for region in rest)
    for index, moves in passing.items():
        if moves:
            label = "outer" if index is None else f"layer.{index}"
            pairs = [(read, [write]) for read, write in moves]
            units.append(copy_unit(f"{label}.unchanged", pairs, layer=index))
    units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    return tensors, units


def _custom(
    model: Model, cut: Mapping[str, tuple[Linear, Entry]]
) -> tuple[dict[str, object], dict[str, bytes]]:
    family = model.family
    body = family.embedding.partition(".")[0] + "."
    config = custom_config(family, model.config.raw)
    config[KEY] = {
        item.region.tensor.removeprefix(body).removesuffix(".weight"): dict(entry)
        for item, entry in cut.values()
    }
    return config, files()
