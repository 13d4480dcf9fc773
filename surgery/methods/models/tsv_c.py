"""A base and, of every fine-tune, the leading singular vectors of its changes: a pack from which each can be taken
out again.

TSV-Compress (arXiv:2412.00081). The first source is the base. Of every matrix and each of T fine-tunes the leading
q triplets of theta_i - theta_0 are stored, q = floor(min(m, n) / T) or ``--rank``, as two factors with the singular
values split evenly, which rounds best. ``moesurg revert PACK --task NAME`` writes theta_0 + U_i S_i V_i^T back as a
model.

The pack holds the base byte for byte, so it needs no other file. Vectors (norms, biases), and matrices whose
factors would be no smaller than they are, are stored in full and come back byte for byte. A pack that is not
smaller than its inputs is refused unless ``--allow-larger`` is given. The report has the relative error of each
change and what fewer triplets would lose (``curve``): truncation is the best that any rank q can do, and the reader
of a pack may cut further.

Factors come from a float64 Gram matrix on the small side. Stacked experts have factors each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...checkpoint.dtypes import FLOATING
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import RefusedError, UsageError
from ...packs import SCHEMA_VERSION, task_names
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="a base and low-rank changes, from which each fine-tune can be taken out again",
    paper="arXiv:2412.00081",
    inputs=common.BASED,
    data="none",
    tier="pack",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    rank: int | None = option(
        None, "triplets of each change; by default the smaller side divided by the number of tasks"
    )
    allow_larger: bool = option(False, "whether a pack may be larger than its inputs")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The base, and factors or full tensors of every fine-tune.

    Raises:
        UsageError: a rank below 1.
        RefusedError: a pack that would not be smaller.
    """
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank {options.rank} should be at least 1")
    notes = common.check(models, least=2, based=True)
    base, tuned = models[0], models[1:]
    names = task_names([model.folder for model in tuned])
    stored = [n for n in base.names() if not (base.config.tied and n == base.family.head)]
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    parts: dict[str, Any] = {}
    for name in stored:
        whole = base.whole(name)
        kept = Region(f"base.{name}", whole.shape)
        specs.append(TensorSpec(kept.tensor, base.dtype(name), whole.shape))
        units.append(copy_unit(kept.tensor, [(whole, [kept])]))
        rank = _rank(whole.shape, options.rank, len(tuned))
        if not {model.dtype(name) for model in models} <= FLOATING:
            rank = None
        parts[name] = {"rank": rank, "dtypes": [model.dtype(name) for model in tuned]}
        for task, model in enumerate(tuned):
            source = replace(whole, source=task + 1)
            if rank is None:
                full = Region(f"{task}.{name}", whole.shape)
                specs.append(TensorSpec(full.tensor, model.dtype(name), whole.shape))
                units.append(copy_unit(full.tensor, [(source, [full])]))
                continue
            left = Region(f"{task}.{name}.left", (*whole.shape[:-1], rank))
            right = Region(f"{task}.{name}.right", (*whole.shape[:-2], rank, whole.shape[-1]))
            made = (left, right)
            specs.extend(TensorSpec(r.tensor, model.dtype(name), r.shape) for r in made)
            matrix = whole.shape[-2] * whole.shape[-1]
            units.append(
                Unit(
                    f"{task}.{name}",
                    "transform",
                    reads=(whole, source),
                    writes=tuple(piece for region in made for piece in pieces(region)),
                    params={"rank": rank},
                    memory=8 * (6 * matrix + 4 * min(whole.shape[-2:]) ** 2),
                )
            )
    given = sum(info.nbytes for model in models for info in model.checkpoint.tensors.values())
    ratio = sum(spec.nbytes for spec in specs) / given
    if ratio >= 1 and not options.allow_larger:
        raise RefusedError(
            f"the pack would hold {ratio:.2f} times the bytes of the models it is made of",
            hint="a smaller --rank, or --allow-larger",
        )
    tasks = [
        {"name": name, "config": dict(model.checkpoint.config)}
        for name, model in zip(names, tuned, strict=True)
    ]
    return Draft(
        {"schema_version": SCHEMA_VERSION, "kind": "tsv-c", "tasks": tasks, "parts": parts},
        specs,
        units,
        Exactness("approximate", "changes are stored at low rank"),
        tier="pack",
        notes=[
            *notes,
            f"the pack holds {ratio:.3f} times the bytes of the models it is made of",
            f"tasks: {', '.join(names)}",
        ],
        format="pack",
    )


def transform(work: Work) -> dict[str, object]:
    """Factors of one change."""
    from ...linalg.lowrank import truncate

    whole, source = work.unit.reads
    lost = total = 0.0
    tails: dict[int, float] = {}
    rank = work.params["rank"]
    slices = list(zip(pieces(whole), pieces(source), strict=True))
    writes = work.unit.writes
    lefts, rights = writes[: len(slices)], writes[len(slices) :]
    for (old, new), left, right in zip(slices, lefts, rights, strict=True):
        shape = whole.shape[-2:]
        change = (work.read(new).double() - work.read(old).double()).reshape(shape)
        found = truncate(change, rank)
        first, second = found.balanced()
        work.write(left, first.reshape(left.shape))
        work.write(right, second.reshape(right.shape))
        lost, total = lost + found.error**2, total + found.norm**2
        values = (first.square().sum(dim=0) * second.square().sum(dim=1)).tolist()
        for kept in {rank, max(1, rank // 2), max(1, rank // 4), max(1, rank // 8)}:
            tails[kept] = tails.get(kept, found.error**2) + sum(values[kept:])
    norm = max(total, 1e-300)
    return {
        "error": (lost / norm) ** 0.5,
        "curve": [[kept, (tail / norm) ** 0.5] for kept, tail in sorted(tails.items())],
    }


def pieces(region: Region) -> tuple[Region, ...]:
    """A matrix, or every matrix of a stack of them."""
    if len(region.shape) == 2:
        return (region,)
    return tuple(region.rows(index, index + 1) for index in range(region.shape[0]))


def _rank(shape: tuple[int, ...], chosen: int | None, tasks: int) -> int | None:
    """Triplets of a matrix, or None if it is stored in full."""
    if len(shape) not in (2, 3):
        return None
    rows, columns = shape[-2:]
    rank = min(chosen or min(rows, columns) // tasks, rows, columns)
    return rank if 0 < rank * (rows + columns) < rows * columns else None
