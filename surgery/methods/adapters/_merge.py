"""What all ways of merging adapters share: weights, alignment of modules, the planned output.

A unit is one module, or one tensor that adapters save in full (`_saved`). What a module's unit does is in `_unit`, how
ranks are chosen in `_ranks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...adapters.output import (
    Written,
    aligned,
    check_agreement,
    config,
    layout_of,
    placed,
    stored_types,
    widest,
)
from ...adapters.packing import LAYOUTS
from ...errors import UsageError
from ...plan import Unit
from .._numbers import parse_numbers
from ..base import Draft, Exactness, option
from . import _saved as saved

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter, Module
    from ...checkpoint.region import Region


class Chosen(Protocol):
    """What a merge has to know; see `MergeOptions`."""

    @property
    def weights(self) -> str | None: ...
    @property
    def missing(self) -> str: ...
    @property
    def full_tensors(self) -> str: ...
    @property
    def base(self) -> str | None: ...
    @property
    def expert_layout(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What the user chooses for every method that merges adapters."""

    weights: str | None = option(
        None, "comma-separated weight of each adapter; by default 1 each", metavar="W,W,..."
    )
    missing: str = option(
        "zero",
        "an adapter that lacks a module counts as zero there, or is skipped and its weight shared out to the others",
        choices=("zero", "skip"),
    )
    full_tensors: str = option(
        "refuse",
        "where tensors that adapters save in full differ: refuse, take the weighted mean or the first, or add up their "
        "changes of the base (ta)",
        choices=saved.MODES,
    )
    base: str | None = option(
        None, "the base model, which --full-tensors ta reads", metavar="MODEL"
    )
    expert_layout: str | None = option(
        None,
        "how stacked experts' second factors are stored; needed where it cannot be told",
        choices=LAYOUTS,
    )


def parse_weights(text: str | None, count: int, default: float = 1.0) -> list[float]:
    """The weight of each adapter.

    Raises:
        UsageError: not numbers, or not one an adapter.
    """
    if text is None:
        return [default] * count
    return parse_numbers("--weights", text, count, "sources")


def weights_in(
    module: str, row: Sequence[object], weights: Sequence[float], missing: str
) -> list[float]:
    """The weights that the adapters have in one module.

    With ``skip`` the weights of those that hold it are scaled to the sum of all weights, so that an average divides by
    the contributors. With ``zero`` they stay, so that it divides by all.

    Args:
        row: what each adapter has of the module, or None.

    Raises:
        UsageError: weights that cannot be scaled because their sum is zero.
    """
    held = sum(weight for weight, one in zip(weights, row, strict=True) if one is not None)
    if missing == "zero" or all(one is not None for one in row):
        return list(weights)
    if not held:
        raise UsageError(
            f"--missing skip: the weights of the adapters that have module {module} add up to 0",
            hint="--missing zero",
        )
    return [weight * sum(weights) / held for weight in weights]


def plan_merge(
    adapters: Sequence[Adapter],
    options: Chosen,
    *,
    rank: Callable[[list[Module]], int],
    params: Mapping[str, Any],
    exactness: Exactness,
    memory: int = 6,
    default_weight: float = 1.0,
    notes: Sequence[str] = (),
) -> Draft:
    """One unit for every module.

    Args:
        adapters: the sources.
        rank: the output's rank of a module from those that the adapters hold of it.
        params: what the transform needs to know, the same for every unit.
        memory: how many copies of all its factors in float64 a unit holds.
        default_weight: of an adapter whose weight the user does not choose.

    Raises:
        InputError: the adapters do not belong together.
        UsageError: weights that do not fit.
    """
    check_agreement(adapters)
    weights = parse_weights(options.weights, len(adapters), default_weight)
    layouts = [layout_of(adapter, options.expert_layout) for adapter in adapters]
    written: list[Written] = []
    units: list[Unit] = []
    for name, row in aligned(adapters).items():
        present = [module for module in row if module is not None]
        chosen = rank(present)
        if chosen < 1:
            raise UsageError(
                f"module {name} would have the rank {chosen}, which should be at least 1"
            )
        entry = Written(
            present[0],
            chosen,
            widest(stored_types(adapters, row)),
            any(module.bias is not None for module in present),
        )
        written.append(entry)
        numbers = sum(module.down.count + module.up.count for module in present)
        numbers += entry.down.count + entry.up.count
        units.append(
            Unit(
                name,
                "transform",
                reads=tuple(
                    placed(region, index)
                    for index, module in enumerate(row)
                    if module is not None
                    for region in _regions(module)
                ),
                writes=entry.regions,
                params={
                    **params,
                    "module": name,
                    "rank": chosen,
                    "weights": weights_in(name, row, weights, options.missing),
                    "mass": math.fsum(weights),
                    "layouts": layouts,
                },
                memory=8 * memory * numbers,
            )
        )
    base = saved.open_base(options.base, options.full_tensors)
    full, added = saved.plan(adapters, weights, options.full_tensors, base)
    specs = [spec for entry in written for spec in entry.specs] + full
    return Draft(
        config(adapters, written, [spec.name for spec in full]),
        specs,
        [*units, *added],
        exactness,
        notes=_notes(adapters, options.missing, notes),
        format="adapter",
        references={str(options.base): base} if base is not None and full else {},
    )


def _regions(module: Module) -> list[Region]:
    both = [module.down, module.up]
    return both if module.bias is None else [*both, module.bias]


def _notes(adapters: Sequence[Adapter], missing: str, notes: Sequence[str]) -> list[str]:
    found = list(notes)
    names = {name for adapter in adapters for name in adapter.modules}
    partly = sum(any(name not in adapter.modules for adapter in adapters) for name in names)
    if partly:
        how = "counts as zero" if missing == "zero" else "is skipped"
        found.append(
            f"{partly} of {len(names)} modules are not in every adapter; an adapter without one {how} there"
        )
    return found
