"""Store experts as one base and changes of low rank (FlexMoRE).

For every expert e but the base, and each of gate, up and down,

    W_e ~ W_base + B A,    A = sqrt(S_r) V_r^T [r, in],    B = U_r sqrt(S_r) [out, r],

with U S V^T the singular value decomposition of W_e - W_base cut to its r largest values, so that what is lost
is the sum of the squares of the others (Eckart and Young). r = min(in, out) gives the expert again up to rounding,
r = 0 the base itself. The base is expert 0 (``--base``), as FlexMoRE takes FlexOlmo's public expert, or the mean of
all experts, which is closer to experts that were not grown from one of them; then every expert has a rank.

``--rank`` gives all experts one rank, or names experts (``1-3:16;4:full``; those that are not named stay whole);
``--schedule`` gives each layer a rank of its own. ``--form factors`` stores the base and the factors, r (in + out)
numbers a matrix, with model code that computes the base once a token; ``--form dense`` multiplies them out and loads
as stock, at the full size: the same function with experts of low rank to look at or to merge.

Deviations from the published code: its ranks are one number for all layers; the SVD is computed in float64
through a Gram matrix on the small side (`linalg/lowrank.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ... import schedules
from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...modeling import custom_config, files
from .._mixture import mixture, one_mixture, prediction_notes, replaced
from ..base import Draft, Exactness, MethodInfo, option
from . import _changes as stored
from ._changes import FULL
from ._own import replaceable
from ._slots import specs
from ._which import parse_numbers

if TYPE_CHECKING:
    from ...architectures.model import Model

INFO = MethodInfo(
    summary="store experts as one base and changes of low rank",
    paper="FlexMoRE",
    inputs="one mixture of experts",
    data="none",
    tier="custom",
)

KEY = "moesurg_lowrank_experts"
"""The same as in `modeling/moesurg_lowrank_experts.py`, which imports torch."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    rank: str | None = option(
        None, "rank of every change, or by expert as in 1-3:16;4:full", metavar="N"
    )
    schedule: str | None = option(
        None, f"rank by layer instead: {schedules.GRAMMAR}", metavar="SCHEDULE"
    )
    base: str = option("0", "the expert that others are changes of, or mean", metavar="N")
    form: str = option(
        "factors",
        "store factors, with model code, or multiply them out for stock loaders",
        choices=("factors", "dense"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The model with experts of low rank.

    Raises:
        UsageError: no rank, two ways to give it, or an expert that is not there.
        InputError: no mixture, or with ``factors`` a family whose experts cannot be replaced.
    """
    model = one_mixture(models, "storing at low rank", "store at low rank")
    base = _base(model, options.base)
    ranks = _ranks(model, options, base)
    small = min(mixture(model.moe_layers[0]).width, model.config.hidden)
    notes = prediction_notes(model)
    if options.form == "dense":
        everyone = range(model.experts)
        tensors, units = replaced(
            model,
            lambda layer: specs(model, layer, everyone),
            lambda layer: stored.dense_units(layer, ranks[layer.index], base),
        )
        return Draft(
            dict(model.config.raw),
            tensors,
            units,
            _exactness(model, ranks, base, dense=True),
            notes=notes,
        )
    place = replaceable(model, "changes of low rank")
    tensors, units = replaced(
        model,
        lambda layer: stored.specs(model, layer, ranks[layer.index], base),
        lambda layer: stored.units(layer, ranks[layer.index], base),
    )
    wide = mixture(model.moe_layers[0]).width + model.config.hidden
    if any(rank * wide >= small * (wide - small) for each in ranks.values() for rank in each):
        notes.append("some changes hold more numbers than the expert they stand for")
    config = custom_config(model.family, model.config.raw)
    config[KEY] = {
        "experts": place,
        "ranks": {str(index): list(each) for index, each in ranks.items()},
    }
    return Draft(
        config,
        tensors,
        units,
        _exactness(model, ranks, base, dense=False),
        tier="custom",
        notes=notes,
        files=files(),
    )


transform = stored.transform


def _base(model: Model, text: str) -> int | None:
    """The base's number, or None for the mean."""
    if text == "mean":
        return None
    (found, *others) = parse_numbers(text, "--base")
    if others or found >= model.experts:
        raise UsageError(f"--base: {text!r} is no expert", hint="give a number, or mean")
    return found


def _ranks(model: Model, options: Options, base: int | None) -> dict[int, list[int]]:
    """The rank of every expert of every layer; 0 for the base, -1 for those that stay whole."""
    layers = model.moe_layers
    if (options.rank is None) == (options.schedule is None):
        raise UsageError("give --rank or --schedule", hint="one of them")
    if options.schedule is not None:
        by_layer = schedules.parse(options.schedule, len(layers), "--schedule")
        found = [[rank] * model.experts for rank in by_layer]
    else:
        found = [_by_expert(options.rank or "", model.experts) for _ in layers]
    limit = min(mixture(layers[0]).width, model.config.hidden)
    for layer, each in zip(layers, found, strict=True):
        if base is not None:
            each[base] = 0
        if max(each) > limit:
            raise InputError(
                f"{model.folder}: layer {layer.index} cannot have changes of rank {max(each)}; experts' matrices have "
                f"at most {limit}"
            )
    return {layer.index: each for layer, each in zip(layers, found, strict=True)}


def _by_expert(text: str, experts: int) -> list[int]:
    if ":" not in text:
        return [_rank(text)] * experts
    found = [FULL] * experts
    for part in text.split(";"):
        who, _, rank = part.partition(":")
        for expert in parse_numbers(who, "--rank"):
            if expert >= experts:
                raise UsageError(f"--rank: there is no expert {expert}, the last is {experts - 1}")
            found[expert] = _rank(rank)
    return found


def _rank(text: str) -> int:
    text = text.strip()
    if text == "full":
        return FULL
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"--rank: {text!r} is no rank", hint="such as 16, 1-3:16;4:full")
    return int(text)


def _exactness(
    model: Model, ranks: dict[int, list[int]], base: int | None, *, dense: bool
) -> Exactness:
    experts = mixture(model.moe_layers[0])
    changes = [
        rank
        for each in ranks.values()
        for expert, rank in enumerate(each)
        if rank != FULL and expert != base
    ]
    if not changes:
        return Exactness("exact", "every expert is stored whole")
    if min(changes) < min(experts.width, experts.hidden):
        return Exactness("approximate", f"changes are cut to rank {min(changes)} or more")
    kinds = {model.dtype(experts.region(0, part).tensor) for part in PROJECTIONS}
    if dense or kinds <= {"F32", "F64"}:
        return Exactness("exact", "changes of full rank give the experts again")
    return Exactness(
        "approximate", "changes of full rank, whose factors are rounded to the stored type"
    )
