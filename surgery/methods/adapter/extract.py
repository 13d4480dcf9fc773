"""What a fine-tune changed, as a LoRA adapter of its base.

    dW = W_tuned - W_base,   B A = the nearest of a rank to dW:   A = S_k^(1/2) V_kᵀ,   B = U_k S_k^(1/2)

for every linear layer of the decoder blocks and, as PEFT's targeted parameters, for the stacked experts of mixtures
(each expert its own factors, gate and up as the one matrix that stock transformers makes of them). The rank is
``--rank``, or the smallest that keeps a share of the squared singular values of each change (``--energy``, at most
``--max-rank``). Layers that did not change are left out. The kernel is a Gram matrix on the small side and an
eigendecomposition in float64; `--fast` takes a randomised one, at a small excess over the optimal error.

What an adapter of linear layers does not hold - norms, embeddings, the head, biases, routers - is compared too: if
any of it changed, the extraction is refused, unless ``--rest skip`` leaves it out, which the report counts, or
``--rest save`` stores what changed of norms, embeddings and the head in full (``modules_to_save``), byte for byte. With
tied embeddings PEFT saves the head apart, so both are stored. Biases and routers cannot be saved: PEFT saves whole
modules, which the former share with factors, and calls the latter by other names than checkpoints do. The base is the
first source, the fine-tune the second; both have one family, one shape and one vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.adapter import PREFIX
from ...adapters.output import Written, config_of
from ...adapters.targets import targets
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ...vocabulary import same_vocabulary
from .._alike import same_settings, same_tensors
from ..base import Draft, Exactness, MethodInfo, option

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="what a fine-tune changed, as a LoRA adapter of its base",
    paper="",
    inputs="a base model and a fine-tune of it",
    data="none",
)
BLOCK = 4 << 20
"""Elements compared at a time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    rank: int | None = option(None, "rank of every module; by default 16")
    energy: float | None = option(
        None,
        "instead: the smallest rank that keeps this share of each change's squared singular values",
    )
    max_rank: int = option(256, "with --energy: the largest rank of a module")
    rest: str = option(
        "refuse",
        "what is done where anything but linear layers changed",
        choices=("refuse", "skip", "save"),
    )
    fast: bool = option(False, "randomised decompositions, nearly optimal")
    base_name: str | None = option(
        None, "name of the base that the adapter's config gives; by default the folder's"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every linear layer at the chosen rank, until it is known what changed.

    Raises:
        InputError: not two models, or two that are not alike.
        UsageError: an option out of range.
    """
    return _plan(models, options, None)


def decide_from_weights(
    model: Model, options: Options, statistics: Any, weights: Weights, seed: int
) -> dict[str, Any]:
    """The rank of every module that changed.

    Raises:
        InputError: something else changed, or nothing did.
    """
    base, tuned = weights.sources
    found = list(targets(base))
    covered = {region.tensor for target in found for region in target.regions}
    others = [name for name in base.names() if name not in covered]
    ranks: dict[str, int] = {}
    for target in weights.track(found):
        needed = 0
        for row in target.rows:
            if options.energy is None:
                changed = any(_differs(weights, region) for region in row)
                needed = max(needed, (options.rank or 16) if changed else 0)
                continue
            values = _values(weights, row)
            energy = values.square()
            total = float(energy.sum())
            if total:
                share = energy.cumsum(0) / total
                needed = max(needed, int((share < options.energy - 1e-12).sum()) + 1)
        most = min(target.inputs, target.outputs)
        limit = most if options.energy is None else min(most, options.max_rank)
        if needed:
            ranks[target.name] = min(needed, limit)
    rest = [name for name in weights.track(others) if _differs(weights, base.whole(name))]
    if rest and options.rest == "refuse":
        raise InputError(
            f"{tuned.folder}: {len(rest)} tensors changed that an adapter of linear layers does not hold, "
            f"{rest[0]!r} first",
            hint="--rest save stores norms, embeddings and the head in full, --rest skip leaves everything out",
        )
    saved: list[str] = []
    if options.rest == "save":
        savable = _savable(base)
        strange = next((name for name in rest if name not in savable), None)
        if strange is not None:
            raise InputError(
                f"{tuned.folder}: {strange!r} changed, which is no norm, no embedding and no head, and "
                "cannot be saved in an adapter",
                hint="--rest skip leaves out everything but linear layers",
            )
        # PEFT saves and loads whole modules.
        owners = {name.rpartition(".")[0] for name in rest}
        saved = [name for name in savable if name.rpartition(".")[0] in owners]
        rest = []
    if not ranks:
        raise InputError(f"{tuned.folder}: no linear layer differs from the base")
    return {"None": {"ranks": ranks, "left_out": rest, "saved": saved}}


def settle(models: Sequence[Model], options: Options, decisions: Any) -> Draft | None:
    """The plan of what changed."""
    return _plan(models, options, decisions["None"])


def transform(work: Work) -> dict[str, object]:
    """Factorise one module's change."""
    import torch

    from ...adapters import packing
    from ...linalg.lowrank import truncate, truncate_randomised

    params = work.params
    downs, ups, lost, size = [], [], 0.0, 0.0
    per_expert = params["matrices"]
    reads = work.unit.reads
    half = len(reads) // 2
    for expert in range(half // per_expert):
        chosen = range(expert * per_expert, (expert + 1) * per_expert)
        change = torch.cat(
            [work.read(reads[half + i]).double() - work.read(reads[i]).double() for i in chosen]
        )
        if params["single"]:
            # Rounding a difference costs a part in 10^7 of it; the decomposition falls back to float64 where it counts.
            change = change.float()
        if params["fast"]:
            rng = work.rng("sketch", params["module"], expert)
            found = truncate_randomised(change, params["rank"], rng)
        else:
            found = truncate(change, params["rank"])
        left, right = found.balanced()
        downs.append(right)
        ups.append(left)
        lost += found.error**2
        size += found.norm**2
    down_region, up_region = work.unit.writes
    work.write(down_region, packing.pack_down(torch.stack(downs), down_region.shape))
    work.write(up_region, packing.pack_up(torch.stack(ups), up_region.shape))
    error = (lost / size) ** 0.5 if size else 0.0
    return {"rank": params["rank"], "error": error, "change": size**0.5}


def _plan(models: Sequence[Model], options: Options, decided: Any) -> Draft:
    if len(models) != 2:
        raise InputError(
            f"extracting takes a base and a fine-tune of it, {len(models)} models were given"
        )
    base, tuned = models
    if options.rank is not None and (options.rank < 1 or options.energy is not None):
        raise UsageError("--rank should be at least 1, and excludes --energy")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise UsageError(f"--energy {options.energy} should be above 0 and at most 1")
    if options.max_rank < 1:
        raise UsageError(f"--max-rank {options.max_rank} should be at least 1")
    same_settings(base, tuned)
    same_tensors(base, tuned, types=False)
    notes = [note for note in [same_vocabulary(base.folder, tuned.folder)] if note]
    written, parameters, units = [], [], []
    for target in targets(base):
        most = min(target.inputs, target.outputs)
        rank = min(most, options.rank or (16 if options.energy is None else options.max_rank))
        if decided is not None:
            if target.name not in decided["ranks"]:
                continue
            rank = decided["ranks"][target.name]
        dtype = tuned.dtype(target.regions[0].tensor)
        entry = Written(target.module(rank), rank, dtype)
        written.append(entry)
        if target.parameter:
            parameters.append(target.parameter)
        reads = [*target.regions, *(dataclasses.replace(r, source=1) for r in target.regions)]
        numbers = target.inputs * target.outputs
        units.append(
            Unit(
                target.name,
                "transform",
                reads=tuple(reads),
                writes=entry.regions,
                params={
                    "module": target.name,
                    "rank": rank,
                    "matrices": len(target.rows[0]),
                    "fast": options.fast,
                    "single": "F64"
                    not in {model.dtype(r.tensor) for model in models for r in reads},
                },
                memory=48 * numbers
                + 32 * most**2
                + 16 * rank * len(target.rows) * (target.inputs + target.outputs),
            )
        )
    if decided is not None and decided["left_out"]:
        notes.append(
            f"{len(decided['left_out'])} changed tensors are not in the adapter, {decided['left_out'][0]!r} first"
        )
    saved = _savable(base) if options.rest == "save" else []
    full, moves = _full(tuned, saved if decided is None else decided["saved"])
    if moves:
        units.append(copy_unit("saved", moves))
        notes.append(f"{len(moves)} tensors are saved in full")
    name = options.base_name or base.folder.resolve().name
    config = config_of(
        written,
        base=name,
        task="CAUSAL_LM",
        parameters=list(dict.fromkeys(parameters)),
        saved=sorted({s.name.removeprefix(PREFIX).rpartition(".")[0] for s in full}),
    )
    why = "each layer's change is truncated to its rank"
    return Draft(
        config,
        [spec for entry in written for spec in entry.specs] + full,
        units,
        Exactness("approximate", why),
        notes=notes,
        format="adapter",
    )


def _savable(model: Model) -> list[str]:
    """Tensors of modules that PEFT can save: norms, which have one dimension, embeddings and the head."""
    whole = (model.family.embedding, model.family.head)
    names = list(model.names())
    found = [
        name
        for name in names
        if name in whole or (name.endswith("norm.weight") and len(model.whole(name).shape) == 1)
    ]
    owners = {name.rpartition(".")[0] for name in found}
    return [name for name in names if name.rpartition(".")[0] in owners]


def _full(
    tuned: Model, names: Sequence[str]
) -> tuple[list[TensorSpec], list[tuple[Region, list[Region]]]]:
    """Tensors that are saved in full, and where their bytes come from: the fine-tune, the second source."""
    embedding, head = tuned.family.embedding, tuned.family.head
    pairs = {name: name for name in names}
    if tuned.config.tied and (embedding in pairs or head in pairs):
        pairs[embedding] = pairs[head] = embedding
    specs, moves = [], []
    for name, stored in sorted(pairs.items()):
        whole = tuned.whole(stored)
        specs.append(TensorSpec(PREFIX + name, tuned.dtype(stored), whole.shape))
        read = dataclasses.replace(whole, source=1)
        moves.append((read, [Region(PREFIX + name, whole.shape)]))
    return specs, moves


def _differs(weights: Weights, region: Region) -> bool:
    """Whether the fine-tune holds other values."""
    import torch

    other = dataclasses.replace(region, source=1)
    if len(region.shape) < 2 or not region.contiguous:
        return not torch.equal(weights.read(region), weights.read(other))
    pairs: Iterator[tuple[torch.Tensor, torch.Tensor]] = zip(
        weights.blocks(region), weights.blocks(other), strict=True
    )
    return any(not torch.equal(first, second) for first, second in pairs)


def _values(weights: Weights, row: Sequence[Region]) -> torch.Tensor:
    """Singular values of a change, float64, largest first."""
    import torch

    from ...linalg.lowrank import singular_values

    parts = [
        weights.read(dataclasses.replace(region, source=1)).double() - weights.read(region).double()
        for region in row
    ]
    return singular_values(torch.cat(parts))
