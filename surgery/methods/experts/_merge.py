"""The plan that all merging methods share: a smaller mixture, in the form that its router and numbers ask for.

A method decides groups; what is done with them is in `_merge_unit.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from .._forms import Form, mapped, ragged, uniform
from .._layers import LayerOptions, layer_counts
from .._mixture import check_expert_types, one_mixture, replaced
from ..base import Draft, Exactness
from ._function import require_plain
from ._merge_unit import merge_units

if TYPE_CHECKING:
    from ...architectures.model import Model

ROUTERS = ("keep", "mean", "tied", "mapped")
ROUTER_HELP = (
    "keep: each merged expert keeps its representative's router row; mean: the rows are averaged like the "
    "experts; tied: all rows stay and every slot of a group holds the merged expert, which reproduces the "
    "papers' summed gates but writes a folder as large as the input; mapped: the same function, each merged "
    "expert stored once, in a folder that loads with its own model code"
)


def plan_merge(
    models: Sequence[Model],
    options: LayerOptions,
    *,
    router: str,
    params: dict[str, Any],
    sample: int = 0,
    counts: Mapping[int, int] | None = None,
) -> Draft:
    """A checkpoint with ``experts`` merged experts per layer (or all slots, for a tied router).

    Args:
        models: exactly one mixture.
        options: the number of groups per layer, and how layers differ.
        router: one of ROUTERS.
        params: what the transform needs to know, the same for every unit. Read here and below: ``router``;
            ``align`` (``none``, ``weight``; in REAM's matching also ``activation`` and ``both``) and
            ``reference`` (``first`` expert of the layer or the group's ``representative``); ``matching``
            (``ream`` for normalised distances); ``rank`` and ``whiten``; ``factors`` (``rank``, ``keep_rows``
            and ``refits`` of a low-rank and row-sparse approximation); ``combine`` (``least-squares`` and its
            ``combine_ridge``); ``reconstruct`` (see ``_reconstruct.py``), which makes a layer one unit.
        sample: rows of each mixture's input that the transform reads.
        counts: experts by layer instead of ``experts`` in each, where layers differ.

    Raises:
        InputError: not one MoE, more experts than there are, or fewer than the router selects.
    """
    model, experts = one_mixture(models, "merging", "merge"), options.experts
    scheduled = layer_counts(model, options)
    counts = scheduled if counts is None else counts
    if options.budget == "global":
        sample = max(sample, options.sample)
    if not 1 <= experts <= model.experts:
        raise InputError(
            f"{model.folder}: --experts {experts} asked for, the model has {model.experts} per layer"
        )
    if experts < model.rule.top_k:
        raise InputError(
            f"{model.folder}: --experts {experts} is fewer than the {model.rule.top_k} experts "
            "each token selects",
            hint=f"use --experts {model.rule.top_k} or more",
        )
    computes = params.get("whiten") or (
        params.get("reconstruct") or params.get("combine") or params.get("matching") == "ream"
    )
    if computes or options.budget == "global":
        require_plain(model)
    placed = router in ("tied", "mapped")
    if model.rule.groups > 1 and not placed and experts != model.experts:
        raise InputError(
            f"{model.folder}: tokens select experts within {model.rule.groups} groups, and merging would move "
            "experts from one group to another",
            hint="--router tied or mapped keeps every expert's place",
        )
    if not placed and experts < model.rule.least_experts:
        raise InputError(
            f"{model.folder}: the router of {model.family.model_type} needs at least "
            f"{model.rule.least_experts} experts, --experts {experts} asked for"
        )
    for layer in model.moe_layers:
        check_expert_types(model, layer)
    form = _form(model, router, counts or {layer.index: experts for layer in model.moe_layers})
    tensors, units = replaced(
        model, form.specs, lambda layer: merge_units(layer, form.of(layer), params, sample)
    )
    notes = []
    if router == "tied":
        notes.append(
            f"the router keeps its {model.experts} rows, so every merged expert is written once for "
            "each of its members and the output is as large as the input"
        )
    exactness = Exactness("approximate", "different experts are averaged")
    if experts == model.experts and counts is None:
        exactness = Exactness("bitwise", "every expert is a group of its own")
        if params.get("reconstruct"):
            reason = "every expert is a group of its own, whose down projection is solved for again"
            exactness = Exactness("exact", reason)
    return form.draft(tensors, units, exactness, notes, sample)


def settle_at_counts(
    plan: Callable[[Sequence[Model], Any, dict[int, int] | None], Draft],
) -> Callable[[Sequence[Model], Any, dict[str, Any]], Draft | None]:
    """A method's ``settle``: its plan with the numbers that a global allocation gave, where they are stored as such."""

    def settle(models: Sequence[Model], options: Any, decisions: dict[str, Any]) -> Draft | None:
        if options.allocation == "uniform" or options.router == "tied":
            return None
        counts = {int(index): len(decided["groups"]) for index, decided in decisions.items()}
        return plan(models, options, counts)

    return settle


def undecided(draft: Draft) -> Draft:
    """A draft for which ``settle`` will find other numbers in every layer."""
    note = (
        "the text decides how many experts each layer keeps; where they differ, the output is padded for stock classes "
        "if that is exact, and brings its own model code if not"
    )
    return dataclasses.replace(draft, notes=[*draft.notes, note])


def _form(model: Model, router: str, counts: Mapping[int, int]) -> Form:
    if router == "mapped":
        return mapped(model, counts)
    if router == "tied":
        return uniform(model, model.experts)
    if len(set(counts.values())) == 1:
        return uniform(model, next(iter(counts.values())))
    return ragged(model, counts)
