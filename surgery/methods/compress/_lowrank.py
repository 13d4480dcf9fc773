"""The machinery all low-rank methods share: targets, ranks, the planned output and how a form is written."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...architectures.linears import GROUPS, Linear, linears
from ...checkpoint.dtypes import nbytes
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness
from ._expert_form import LOAD
from ._options import check_ratio, one_model
from ._ranks import FORMS, stored, uniform_ranks
from ._replace import Cut, replace_matrices, shape_of

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work
    from ...linalg.lowrank import LowRank

RANK_PLAN = "rank_plan.json"

RATIO_HELP = "fraction of the targeted matrices' numbers to remove, above 0 and below 1 (0.2: a fifth is removed)"
FORM_HELP = (
    "how a matrix of low rank is stored; pivot: some of its rows and the coefficients of the others; factors: two "
    "matrices; dense: as before, at the rank of the pivot form, which saves nothing and loads as stock. Of a mixture's "
    "experts, each has its own, at one rank within a layer"
)
TARGETS_HELP = "what to compress: all, or a comma-separated list of attention, ffn and single roles such as q,k,down"
ALIGN_HELP = "round ranks down to a multiple of this where a matrix has 64 of it on its small side; 1 keeps all"


def plan_lowrank(
    models: Sequence[Model],
    *,
    form: str,
    ratio: float | None,
    targets: str,
    align: int,
    params: dict[str, Any],
    memory: int = 0,
    chosen_ranks: Mapping[str, int] | None = None,
    in_bytes: bool = False,
) -> Draft:
    """The model with its targeted linear layers at uniform ranks, or at those a method decided on.

    Args:
        ratio: not needed where ranks are given.
        params: what the transform needs to know, the same for every unit.
        chosen_ranks: ranks by the linear layers' labels; a layer that is absent stays as it is.
        in_bytes: an index counts what it takes on the disk, not as one number.
        memory: multiple of the input width squared, in bytes, that a unit needs beyond its matrix.

    Raises:
        InputError: not one model, or experts that the form cannot hold.
        UsageError: an option out of range.
    """
    model = one_model(models)
    if ratio is not None:
        check_ratio(ratio)
    if align < 1:
        raise UsageError(f"--align {align} should be at least 1")
    chosen = choose(model, targets)
    index = 4 / min(nbytes(model.dtype(linear.region.tensor), (1,)) for linear in chosen)
    if chosen_ranks is None:
        counts = Counter(shape_of(linear.region) for linear in chosen)
        by_shape = uniform_ranks(counts, form, ratio or 0.0, align, index if in_bytes else 1.0)
        chosen_ranks = {
            linear.label: by_shape.ranks.get(shape_of(linear.region), 0) for linear in chosen
        }
    given = {}
    for linear in chosen:
        # Whatever was asked for: what would take as many bytes as before stays as it is.
        rank, shape = chosen_ranks.get(linear.label, 0), shape_of(linear.region)
        given[linear.label] = rank if stored(form, shape, rank, index) < shape[0] * shape[1] else 0
    if not any(given.values()):
        raise InputError(
            f"{model.folder}: no targeted matrix is large enough to be stored with "
            f"{'' if ratio is None else f'{ratio:.0%} '}fewer numbers in the {form} form",
            hint="use a smaller --ratio",
        )
    cuts = [
        _cut(linear, given[linear.label], form, params, memory)
        for linear in chosen
        if given[linear.label]
    ]
    made = replace_matrices(model, cuts, form=form)
    why = f"{len(cuts)} matrices are replaced by matrices of lower rank"
    return Draft(
        made.config,
        made.tensors,
        made.units,
        Exactness("approximate", why),
        tier="stock" if form == "dense" else "custom",
        notes=_notes(chosen, given, form),
        files=made.files,
        results={RANK_PLAN: rank_table},
    )


def _cut(linear: Linear, rank: int, form: str, params: Mapping[str, Any], memory: int) -> Cut:
    rows, columns = shape_of(linear.region)
    facts: dict[str, Any] = {"form": form, "rank": rank, "name": stored_name(linear)}
    if linear.expert is not None:
        facts |= {"expert": linear.expert, "role": linear.role}
    # The matrix, its approximation and their difference in float64, and a decomposition.
    need = 40 * rows * columns + 32 * min(rows, columns) ** 2 + memory * columns**2
    return Cut(linear, {"form": form, "rank": rank}, {**params, **facts}, need)


def choose(model: Model, targets: str) -> list[Linear]:
    """The linear layers that ``--targets`` names.

    Raises:
        UsageError: a word that names nothing in this model.
        InputError: a matrix whose numbers lie between those of others, so that it cannot be written by itself.
    """
    every = list(linears(model))
    roles = list(dict.fromkeys(linear.role for linear in every))
    words = [word.strip() for word in targets.split(",") if word.strip()]
    known = {"all", *GROUPS, *roles}
    for word in words:
        if word not in known:
            raise UsageError(
                f"--targets: {word!r} names no linear layer of {model.family.model_type}",
                hint=f"use all, {', '.join(GROUPS)}, {', '.join(roles)}",
            )
    if not words:
        raise UsageError("--targets names nothing", hint="use all to compress every linear layer")
    found = [linear for linear in every if {"all", linear.group, linear.role}.intersection(words)]
    for linear in found:
        if not linear.region.contiguous:
            raise InputError(
                f"{model.folder}: {linear.region.tensor!r} holds matrices transposed or interleaved, so {linear.label} "
                "cannot be written by itself",
                hint="--targets attention, or a method that writes whole experts, such as molae or d2-moe",
            )
    return found


def write_lowrank(work: Work, found: LowRank) -> dict[str, object]:
    """Write an approximation in the unit's form; returns what it cost.

    ``error`` is relative, in the norm the method minimises; ``stored_error`` is the relative Frobenius distance
    of the stored numbers from the approximation before it was rounded.
    """
    import torch

    from ...checkpoint.dtypes import torch_dtype
    from ...linalg.pivot import pack

    kind = torch_dtype(work.params["dtype"])
    writes = work.unit.writes
    whole = found.product()
    if work.params["form"] == "dense":
        work.write(writes[0], whole)
        kept = whole.to(kind).double()
    elif work.params["form"] == "factors":
        left_MR, right_RN = found.balanced()
        work.write(writes[0], right_RN)
        work.write(writes[1], left_MR)
        kept = left_MR.to(kind).double() @ right_RN.to(kind).double()
    else:
        packed = pack(found.left_MR, found.right_RN)
        work.write(writes[0], packed.rows_RN)
        work.write(writes[1], packed.coef_SR)
        work.write(writes[2], packed.index_R)
        rounded = packed.cast(kind)
        kept = dataclasses.replace(
            rounded, rows_RN=rounded.rows_RN.double(), coef_SR=rounded.coef_SR.double()
        ).unpack()
    norm = float(torch.linalg.vector_norm(whole))
    lost = float(torch.linalg.vector_norm(kept - whole)) / norm if norm else 0.0
    return {"rank": found.rank, "error": found.relative_error, "stored_error": lost}


def stored_name(linear: Linear) -> str:
    """What tables of ranks call a matrix: its weight's name without the end, an expert's with its number."""
    if linear.expert is None:
        return linear.region.tensor.removesuffix(".weight")
    prefix = linear.region.tensor.partition(f"layers.{linear.layer}.")[0]
    return f"{prefix}layers.{linear.layer}.mlp.experts.{linear.expert}.{linear.role}_proj"


def rank_table(units: Sequence[Unit], metrics: Mapping[str, Any]) -> bytes:
    """The contents of ``rank_plan.json``: rank, form and relative error of every matrix that was replaced."""
    entries = {
        unit.params["name"]: {
            "rank": unit.params["rank"],
            "form": unit.params["form"],
            "error": metrics[unit.id]["error"],
        }
        for unit in units
        if "rank" in unit.params
    }
    table = {"schema_version": 1, "matrices": entries}
    return (json.dumps(table, indent=1) + "\n").encode()


def _notes(chosen: Sequence[Linear], ranks: Mapping[str, int], form: str) -> list[str]:
    found: dict[tuple[int, int], set[int]] = {}
    before = after = 0
    for linear in chosen:
        rows, columns = shape_of(linear.region)
        rank = ranks[linear.label]
        before += rows * columns
        after += int(stored(form, (rows, columns), rank)) if rank else rows * columns
        if rank:
            found.setdefault((rows, columns), set()).add(rank)
    listed = ", ".join(
        f"{rows}x{columns}: {min(here)}" + (f" to {max(here)}" if len(here) > 1 else "")
        for (rows, columns), here in sorted(found.items())
    )
    notes = [f"ranks by shape: {listed}"]
    left = sum(not ranks[linear.label] for linear in chosen)
    if left:
        notes.append(f"{left} targeted matrices stay as they are, because no rank would save")
    removed = 1 - after / before
    if form == "dense":
        notes.append(
            f"the ranks would remove {removed:.1%} of the targeted numbers in the pivot form; the dense form "
            "stores all of them"
        )
    else:
        notes.append(
            f"the {len(chosen)} targeted matrices take {after:,} numbers instead of "
            f"{before:,} ({removed:.1%} removed)"
        )
        notes.append(LOAD)
    return notes


__all__ = ["FORMS", "choose", "plan_lowrank", "shape_of", "write_lowrank"]
