"""Planning and writing for methods that store a matrix as parts of several kinds.

One entry (`_entries.py`) serves all matrices of a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.dtypes import nbytes
from ...errors import InputError
from ..base import Draft, Exactness, option, required
from ._entries import Entry, Shape, largest_rank, size
from ._expert_form import LOAD
from ._lowrank import TARGETS_HELP, choose
from ._options import check_ratio, one_model
from ._replace import Cut, replace_matrices, shape_of

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work

RATIO_HELP = "fraction of the targeted matrices' bytes to remove, above 0 and below 1"
FORMS = ("parts", "dense")
FORM_HELP = (
    "parts: as the method makes them, with model code; dense: a matrix as before, which saves nothing and loads as "
    "stock"
)
LORA_HELP = (
    f"{FORM_HELP}; lora: the rounded matrices as a stock model in the folder base, and the residual as its PEFT "
    "adapter in the folder adapter"
)


@dataclass(frozen=True)
class PartsOptions:
    """Options of every method that stores matrices as parts; a method's own ones follow in its subclass."""

    ratio: float = required(RATIO_HELP)
    form: str = option("parts", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)


def plan_parts(
    models: Sequence[Model],
    options: PartsOptions,
    *,
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
        InputError: not one model, experts that the form cannot hold, or no matrix to replace.
        UsageError: an option out of range.
    """
    form, ratio = options.form, options.ratio
    model = one_model(models)
    check_ratio(ratio)
    parts = form == "parts"
    chosen = choose(model, options.targets)
    kinds = {(shape_of(item.region), model.dtype(item.region.tensor)) for item in chosen}
    entries = {kind: entry_of(*kind) for kind in sorted(kinds)}
    cuts: list[Cut] = []
    before = after = 0
    for item in chosen:
        shape, dtype = shape_of(item.region), model.dtype(item.region.tensor)
        entry, whole = entries[shape, dtype], nbytes(dtype, shape)
        before += whole
        after += whole if entry is None else size(entry, shape, dtype)
        if entry is not None:
            rows, columns = shape
            need = (64 + memory) * rows * columns + 32 * min(rows, columns) ** 2
            known = {**params, "parts": parts, "lora": form == "lora", "entry": dict(entry)}
            cuts.append(Cut(item, entry, known, need))
    if not cuts:
        raise InputError(
            f"{model.folder}: no targeted matrix can be stored with {ratio:.0%} fewer bytes",
            hint="use a smaller --ratio",
        )
    lora = form == "lora"
    made = replace_matrices(model, cuts, form="dense" if lora else form)
    if lora:
        from ._lora import with_adapter

        made = with_adapter(model, made, cuts)
    removed = f"{after:,} bytes instead of {before:,} ({1 - after / before:.1%} removed)"
    shapes = ", ".join(
        f"{rows}x{columns}: {entry['rank']}"
        for ((rows, columns), _), entry in entries.items()
        if entry is not None
    )
    notes = [f"ranks by shape: {shapes}"]
    if parts:
        notes.append(f"the {len(chosen)} targeted matrices take {removed}")
        notes.append(LOAD)
    elif lora:
        notes.append(
            "PEFT puts them together: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("
            "FOLDER + '/base'), FOLDER + '/adapter'); the base is stored in its own type, so nothing is saved until a "
            "loader rounds it again"
        )
    else:
        notes.append(f"the parts would take {removed}; the dense form stores all of them")
    left = len(chosen) - len(cuts)
    if left:
        notes.append(f"{left} targeted matrices stay as they are, because nothing would be saved")
    why = f"{len(cuts)} matrices are replaced by sums of simpler ones"
    return Draft(
        made.config,
        made.tensors,
        made.units,
        Exactness("approximate", why),
        tier="custom" if parts else "stock",
        notes=notes,
        files=made.files,
        format="model and adapter" if lora else "model",
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


__all__ = ["Entry", "PartsOptions", "Shape", "largest_rank", "plan_parts", "size", "write_parts"]
