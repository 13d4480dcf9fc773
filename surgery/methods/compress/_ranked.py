"""What all methods have in common that give every matrix a rank: options, allocation, the table of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.dtypes import nbytes
from ...checkpoint.header import read_json
from ...errors import InputError, UsageError
from ..base import Draft, option
from ._allocate import RULE_HELP, RULES, Item, allocate
from ._lowrank import (
    ALIGN_HELP,
    FORM_HELP,
    RATIO_HELP,
    TARGETS_HELP,
    choose,
    plan_lowrank,
    shape_of,
    stored_name,
)
from ._ranks import FORMS

if TYPE_CHECKING:
    import torch

    from ...architectures.linears import Linear
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...weights import Weights


@dataclass(frozen=True)
class RankOptions:
    """Options of every method that gives matrices a rank; a method's own ones follow in its subclass."""

    ratio: float | None = option(None, RATIO_HELP)
    form: str = option("pivot", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)
    align: int = option(16, ALIGN_HELP)
    allocate: str = option("uniform", RULE_HELP, choices=RULES)
    ratio_of: str = option(
        "parameters",
        "what --ratio counts; bytes: the pivots' indices weigh what they take on the disk",
        choices=("parameters", "bytes"),
    )
    rank_plan: str | None = option(
        None,
        "a file of ranks by matrix instead of --ratio, such as the rank_plan.json of an earlier output; matrices "
        "that it does not list stay whole",
        metavar="FILE",
    )


def plan_ranked(
    models: Sequence[Model],
    options: RankOptions,
    params: dict[str, Any],
    decisions: Mapping[str, Any] | None = None,
    memory: int = 0,
) -> Draft:
    """The model with its targeted matrices at uniform, decided or listed ranks.

    Args:
        params: what the transform needs to know, the same for every unit.
        decisions: what :func:`decided_ranks` gave, by layer; None to plan at uniform ranks, which take as much room.
        memory: multiple of the input width squared, in bytes, that a unit needs beyond its matrix.

    Raises:
        UsageError: an option out of range, or two that exclude each other.
        InputError: as :func:`plan_lowrank`, or a table of ranks that does not fit the model.
    """
    ranks: dict[str, int] | None = None
    ratio = options.ratio
    if options.rank_plan is not None:
        # WeLore's own rule is its default.
        usual = type(options).__dataclass_fields__["allocate"].default
        if ratio is not None or options.allocate != usual:
            raise UsageError("--rank-plan excludes --ratio and --allocate", hint="give one of them")
        if len(models) == 1:
            ranks = read_ranks(Path(options.rank_plan), choose(models[0], options.targets))
    elif ratio is None:
        raise UsageError("give --ratio or --rank-plan", hint="--ratio 0.2 removes a fifth")
    elif decisions is not None:
        ranks = {}
        for layer in decisions.values():
            ranks.update(layer["ranks"])
    return plan_lowrank(
        models,
        form=options.form,
        ratio=ratio,
        targets=options.targets,
        align=options.align,
        params=params,
        memory=memory,
        chosen_ranks=ranks,
        in_bytes=options.ratio_of == "bytes",
    )


def decided_ranks(
    model: Model,
    options: RankOptions,
    weights: Weights,
    spectrum: Callable[[Linear, torch.Tensor], torch.Tensor],
) -> dict[str, dict[str, Any]] | None:
    """Ranks by layer, from the spectra of the weights; None where options give them already.

    Args:
        spectrum: of a matrix: singular values in the norm that the method minimises, largest first, float64.

    Raises:
        InputError: nothing meets the ratio.
    """
    if options.allocate == "uniform" or options.ratio is None:
        return None
    groups, items = grouped(choose(model, options.targets), weights, spectrum)
    found = allocate(
        items,
        options.allocate,
        form=options.form,
        ratio=options.ratio,
        align=options.align,
        index=index_of(model, options),
    )
    if not found:
        raise InputError(
            f"{model.folder}: --allocate {options.allocate} finds no ranks that remove {options.ratio:.0%} of the "
            f"targeted numbers in the {options.form} form",
            hint="use a smaller --ratio",
        )
    return by_layer(groups, found)


def decided_with_text(
    model: Model,
    options: RankOptions,
    statistics: Grams,
    weights: Weights,
    spectrum: Callable[[Linear, torch.Tensor], torch.Tensor],
) -> dict[str, Any]:
    """By layer how many inputs its matrices sum, and what :func:`decided_ranks` gives."""
    from ...calibration.gram_folder import layer_statistics

    decided: dict[str, Any] = dict(layer_statistics(statistics, model))
    for layer, found in (decided_ranks(model, options, weights, spectrum) or {}).items():
        decided[layer].update(found)
    return decided


def settle_at_ranks(
    plan: Callable[[Sequence[Model], Any, dict[str, Any]], Draft],
) -> Callable[[Sequence[Model], Any, dict[str, Any]], Draft | None]:
    """A method's ``settle``: its plan with the ranks among the decisions; none where options gave them already."""

    def settle(models: Sequence[Model], options: Any, decisions: dict[str, Any]) -> Draft | None:
        ranked = {layer: found for layer, found in decisions.items() if "ranks" in found}
        return plan(models, options, ranked) if ranked else None

    return settle


def own_spectrum(linear: Linear, matrix_MN: torch.Tensor) -> torch.Tensor:
    """The singular values of a matrix itself, for methods that minimise the Frobenius norm."""
    from ...linalg.lowrank import singular_values

    return singular_values(matrix_MN)


def grouped(
    chosen: Sequence[Linear],
    weights: Weights,
    spectrum: Callable[[Linear, torch.Tensor], torch.Tensor],
) -> tuple[dict[str, list[Linear]], dict[str, Item]]:
    """Matrices that get one rank, and what is known of their spectra, by a label of theirs.

    Experts of a layer get one for each projection, because their factors are stored in one tensor.
    """
    import numpy as np

    groups: dict[str, list[Linear]] = {}
    squares: dict[str, Any] = {}
    for linear in weights.track(chosen):
        own = linear.expert is None
        label = linear.label if own else f"layer.{linear.layer}.experts.{linear.role}"
        groups.setdefault(label, []).append(linear)
        values_P = spectrum(linear, weights.read(linear.region)).numpy()
        squares[label] = squares.get(label, 0.0) + np.square(values_P)
    return groups, {
        label: Item(shape_of(group[0].region), len(group), np.sqrt(squares[label] / len(group)))
        for label, group in groups.items()
    }


def by_layer(
    groups: Mapping[str, Sequence[Linear]], ranks: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Decided ranks as they are journalled: by layer, by the label of every matrix."""
    decided: dict[str, dict[str, Any]] = {}
    for label, group in groups.items():
        for linear in group:
            layer = decided.setdefault(str(linear.layer), {"ranks": {}})
            if label in ranks:
                layer["ranks"][linear.label] = ranks[label]
    return decided


def index_of(model: Model, options: RankOptions) -> float:
    """What the index of a pivot counts."""
    if options.ratio_of != "bytes":
        return 1.0
    return index_weight(model, choose(model, options.targets))


def index_weight(model: Model, chosen: Sequence[Linear]) -> float:
    """What the index of a pivot takes in numbers of the matrices' type; of several types, the smallest."""
    sizes = {nbytes(model.dtype(linear.region.tensor), (1,)) for linear in chosen}
    return 4 / min(sizes) if sizes else 1.0


def read_ranks(file: Path, chosen: Sequence[Linear]) -> dict[str, int]:
    """Ranks by label from a table: ``{"matrices": {name: {"rank": 96}}}``, or names and ranks alone.

    Names are those of the weights without ``.weight``, of experts with their number. An entry without a rank, or with
    the form ``whole``, stays as it is.

    Raises:
        InputError: it cannot be read, or an entry fits no targeted matrix.
    """
    table = read_json(file)
    entries = table.get("matrices", table)
    if not isinstance(entries, Mapping):
        raise InputError(f"{file}: expected an object of ranks by matrix")
    known = {stored_name(linear): linear for linear in chosen}
    found: dict[str, int] = {}
    for name, entry in entries.items():
        if name == "schema_version":
            continue
        linear = known.get(name)
        if linear is None:
            raise InputError(
                f"{file}: {name!r} is no targeted matrix of this model",
                hint=f"names look like {next(iter(known), '')}",
            )
        rank = entry.get("rank") if isinstance(entry, Mapping) else entry
        if rank is None or (isinstance(entry, Mapping) and entry.get("form") == "whole"):
            continue
        small = min(linear.region.shape)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= small:
            raise InputError(f"{file}: {name!r} has the rank {rank!r}, expected 1 to {small}")
        if rank < small:
            found[linear.label] = rank
    return found


__all__ = [
    "RankOptions",
    "by_layer",
    "decided_ranks",
    "decided_with_text",
    "grouped",
    "index_of",
    "own_spectrum",
    "plan_ranked",
    "read_ranks",
    "settle_at_ranks",
]
