"""An output in two folders: a stock model, and what its matrices lack as a LoRA adapter in PEFT's format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...adapters.adapter import PREFIX, Module
from ...adapters.output import Written, config_of
from ...checkpoint.formats import ADAPTER_FOLDER, BASE_FOLDER
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...outputs import carried_from_all, config_bytes
from ...plan import Move, Unit
from ._replace import Cut, Replaced, shape_of

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work
    from ...linalg.lowrank import LowRank


def with_adapter(model: Model, made: Replaced, cuts: Sequence[Cut]) -> Replaced:
    """An output whose units write a matrix each, with an adapter of the rank in every matrix's entry.

    A unit then writes its matrix, A and B, in this order (:func:`write_sum`).

    Args:
        made: the output with matrices of the shape they had.

    Raises:
        InputError: an expert's matrix, or one that nothing is added to.
    """
    written: dict[str, Written] = {}
    for cut in cuts:
        name, rank = cut.linear.region.tensor, cut.entry["rank"]
        if cut.linear.expert is not None or not name.endswith(".weight"):
            raise InputError(
                f"{model.folder}: --form lora is for linear layers, {cut.linear.label} is an expert's matrix; PEFT "
                "makes every expert's change whenever it runs, which takes more than it saves",
                hint="use --targets attention, or --form parts",
            )
        if not rank:
            raise InputError(
                f"{model.folder}: {cut.linear.label} has a residual of rank 0, so there is nothing for an adapter",
                hint="use a larger --rank or a smaller --ratio, or --form dense",
            )
        rows, columns = shape_of(cut.linear.region)
        module = name.removesuffix(".weight")
        down, up = (
            Region(f"{ADAPTER_FOLDER}/{PREFIX}{module}.lora_{leaf}.weight", shape)
            for leaf, shape in (("A", (rank, columns)), ("B", (rows, rank)))
        )
        kept = Module(module, "linear", down, up, None, rank, 1.0, 1)
        written[cut.linear.label] = Written(kept, rank, model.dtype(name))
    tensors = [TensorSpec(_below(spec.name), spec.dtype, spec.shape) for spec in made.tensors]
    tensors += [spec for entry in written.values() for spec in entry.specs]
    units = [_moved(unit, written) for unit in made.units]
    adapter = config_of(list(written.values()), base=BASE_FOLDER, task="CAUSAL_LM")
    small = {
        f"{BASE_FOLDER}/{name}": data for name, data in carried_from_all([model.folder]).items()
    }
    small[f"{BASE_FOLDER}/config.json"] = config_bytes(made.config)
    small[f"{ADAPTER_FOLDER}/adapter_config.json"] = config_bytes(adapter)
    shelf: dict[str, object] = {
        "schema_version": 1,
        "members": {
            BASE_FOLDER: {"holds": "a stock model, the source with its matrices rounded"},
            ADAPTER_FOLDER: {"holds": "what is added to them, a LoRA adapter of it"},
        },
    }
    return Replaced(tensors, units, shelf, small)


def write_sum(work: Work, rounded: Any, rest: LowRank) -> dict[str, object]:
    """Write a matrix and the low rank that is added to it.

    Args:
        rounded: the matrix, float64, as its stored type holds it.

    Returns:
        ``rank``, and the relative Frobenius ``error`` of the sum.
    """
    import torch

    matrix, down, up = work.unit.writes
    left_MR, right_RN = rest.balanced()
    work.write(matrix, rounded)
    work.write(down, right_RN)
    work.write(up, left_MR)
    original = work.read(work.unit.reads[0]).double()
    norm = float(torch.linalg.vector_norm(original))
    lost = float(torch.linalg.vector_norm(rounded + rest.product() - original))
    return {"rank": rest.rank, "error": lost / norm if norm else 0.0}


def _moved(unit: Unit, written: Mapping[str, Written]) -> Unit:
    """A unit whose model lies below its folder; one of an adapted matrix writes its factors too."""
    writes = tuple(
        dataclasses.replace(region, tensor=_below(region.tensor)) for region in unit.writes
    )
    if unit.id in written:
        writes += (written[unit.id].down, written[unit.id].up)
    moves = tuple(
        Move(
            move.read,
            tuple(
                dataclasses.replace(region, tensor=_below(region.tensor)) for region in move.writes
            ),
        )
        for move in unit.moves
    )
    return dataclasses.replace(unit, writes=writes, moves=moves)


def _below(name: str) -> str:
    return f"{BASE_FOLDER}/{name}"
