"""Few bits for a matrix, and a low-rank matrix for what that loses.

    W' = Q + B A,   Q = integers times a scale per group of inputs,   B A = W - Q cut to rank R,

the form of LQER, LoRC and QERA. With text (``--data``, or ``--calibration`` of `calibrate --linear-grams`) the
remainder is cut so that the outputs' error on it is least, which is QERA's closed form (arXiv:2410.06040) computed as
in ``svd-llm``, without roots or inverses; without text in the Frobenius norm.

Rounding is to the nearest; scales are symmetric and chosen for their group's squared error (for ``ternary`` exactly).
``--bits`` and ``--group`` decide the integers' size; ``--rank`` is lowered until ``--ratio`` of the bytes is gone,
and a ratio that the integers alone do not reach is refused. Sizes count codes, scales and factors as stored.
``--form parts`` stores packed codes and decodes them at every call, which saves memory, not time; ``dense`` stores
the sum. ``lora`` stores Q as a stock model and B A as an adapter of it in PEFT's format, for loaders that hold a base
in few bits and add adapters (QLoRA's way of serving): Q is rounded once to the model's type, and the residual makes up
for that too. Other methods of `compress` have no such form: without Q the base would be zero and still be stored, and
that of ``d2-moe`` would be stored once an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option
from ._options import check_damping
from ._parts import (
    FORMS,
    LORA_HELP,
    Entry,
    PartsOptions,
    Shape,
    largest_rank,
    plan_parts,
    write_parts,
)

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...execute import Work

INFO = MethodInfo(
    summary="integers of few bits and a low-rank residual",
    paper="arXiv:2410.06040",
    inputs="one dense model or mixture",
    data="gram",
    tier="custom",
    optional=True,
)
BITS = {"int8": 8, "int4": 4, "ternary": 2}


@dataclass(frozen=True)
class Options(PartsOptions):
    """What the user chooses."""

    form: str = option("parts", LORA_HELP, choices=(*FORMS, "lora"))
    bits: str = option("int4", "what the matrix is rounded to", choices=tuple(BITS))
    group: int = option(64, "consecutive inputs that share a scale")
    rank: int = option(32, "rank of the residual at most; 0 stores none")
    damping: float = option(
        1e-4, "with text: multiple of the mean of the Gram matrix's diagonal that is added to it"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """One form for all matrices of a shape.

    Raises:
        UsageError: an option out of range.
        InputError: the integers alone take more than the ratio leaves.
    """
    if options.group < 1 or options.rank < 0:
        raise UsageError(
            f"--group {options.group} should be at least 1 and --rank {options.rank} at least 0"
        )
    check_damping(options.damping)

    def entry_of(shape: Shape, dtype: str) -> Entry | None:
        def make(rank: int) -> Entry:
            return {
                "form": "quantised",
                "bits": BITS[options.bits],
                "group": options.group,
                "rank": rank,
            }

        top = min(options.rank, *shape)
        rank = largest_rank(make, top, shape, dtype, options.ratio)
        if rank < 0 and largest_rank(make, 0, shape, dtype, 0.0) >= 0:
            raise InputError(
                f"{options.bits} in groups of {options.group} takes more than {1 - options.ratio:.0%} of a matrix of "
                f"shape {list(shape)} in {dtype}",
                hint="use a smaller --ratio, fewer --bits or a larger --group",
            )
        return make(rank) if rank >= 0 else None

    return plan_parts(
        models,
        options,
        entry_of=entry_of,
        params={"bits": options.bits, "damping": options.damping},
        memory=64,
    )


def decide(model: Model, options: Options, statistics: Grams, seed: int) -> dict[str, Any]:
    """Nothing is decided but that every layer has its matrices; tells how many inputs they sum."""
    from ...calibration.gram_folder import layer_statistics

    return layer_statistics(statistics, model)


def transform(work: Work) -> dict[str, object]:
    """Round one matrix and factorise what that lost."""
    import torch

    from ...calibration.gram_folder import Grams
    from ...checkpoint.dtypes import torch_dtype
    from ...linalg.lowrank import truncate
    from ...linalg.quantise import quantise
    from ...linalg.whitening import truncate_whitened

    (region,) = work.unit.reads
    entry, kind = work.params["entry"], torch_dtype(work.params["dtype"])
    matrix = work.read(region)
    found = quantise(matrix, work.params["bits"], entry["group"])
    # The residual makes up for the rounding of the scales too.
    dense = found.rounded(kind).dense()
    if work.params["lora"]:
        dense = dense.to(kind).double()
    tensors = {"codes": found.packed(), "scales": found.scales_MG}
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    rounding = float(torch.linalg.vector_norm(dense - matrix)) / norm if norm else 0.0
    if entry["rank"]:
        gram = None
        if work.decision is not None:
            gram, _ = Grams.open(work.statistics).read(work.layer, work.params["input"])
        left = matrix.double() - dense
        if gram is not None and bool(gram.any()):
            rest = truncate_whitened(left, gram, entry["rank"], damping=work.params["damping"])
        else:
            rest = truncate(left, entry["rank"])
        if work.params["lora"]:
            from ._lora import write_sum

            return {**write_sum(work, dense, rest), "rounding": rounding}
        left_MR, right_RN = rest.balanced()
        tensors |= {"lowrank_A.weight": right_RN, "lowrank_B.weight": left_MR}
        dense = dense + rest.product()
    return {**write_parts(work, dense, tensors), "rounding": rounding}
