"""What a fine-tune changed, as a LoRA adapter of its base.

    dW = W_tuned - W_base,   B A = the nearest of a rank to dW:   A = S_k^(1/2) V_kᵀ,   B = U_k S_k^(1/2)

for every linear layer of the decoder blocks and, as PEFT's targeted parameters, for the stacked experts of mixtures
(each expert its own factors, gate and up as the one matrix that stock transformers makes of them). The rank is
``--rank``, or the smallest that keeps a share of the squared singular values of each change (``--energy``, at most
``--max-rank``). Layers that did not change are left out. The kernel is a Gram matrix on the small side and an
eigendecomposition in float64; `--fast` takes a randomised one, at a small excess over the optimal error.

What an adapter of linear layers does not hold - norms, embeddings, the head, biases, routers - is compared too: if
any of it changed, the extraction is refused, unless ``--rest skip`` leaves it out, which the report counts. The base
is the first source, the fine-tune the second; both have one family, one shape and one vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...adapters.output import Written, config_of
from ...adapters.targets import targets
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit
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
        choices=("refuse", "skip"),
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
    base, _ = weights.sources
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
            f"{weights.sources[1].folder}: {len(rest)} tensors changed that an adapter of linear layers does not hold, "
            f"{rest[0]!r} first",
            hint="--rest skip leaves them out",
        )
    if not ranks:
        raise InputError(f"{weights.sources[1].folder}: no linear layer differs from the base")
    return {"None": {"ranks": ranks, "left_out": rest}}


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
    name = options.base_name or base.folder.resolve().name
    config = config_of(
        written, base=name, task="CAUSAL_LM", parameters=list(dict.fromkeys(parameters))
    )
    why = "each layer's change is truncated to its rank"
    return Draft(
        config,
        [spec for entry in written for spec in entry.specs],
        units,
        Exactness("approximate", why),
        notes=notes,
        format="adapter",
    )


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
