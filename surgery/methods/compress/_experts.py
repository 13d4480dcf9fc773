"""The plan of methods that compress a mixture's experts together: sizes, ranks, the output. `_expert_unit.py` runs it.

Gate, up and down are replaced by an entry each (`_entries.py`), the same in every layer. It decides the tensors of the
``shared`` form; the ``dense`` form writes the matrices these stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...modeling import custom_config, files
from ...plan import Unit, copy_unit
from .._mixture import check_expert_types, mixture, one_mixture, prediction_notes, replaced
from ..base import Draft, Exactness, option, required
from . import _expert_form as form_of_experts
from ._entries import expert_leaves
from ._expert_form import LOAD, WHOLE, Entries
from ._options import check_ratio

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model

RATIO_HELP = (
    "fraction of all numbers of the routed experts' matrices to remove, above 0 and below 1, whichever of them "
    "are factorised"
)
FORM_HELP = "shared: the factors, with model code; dense: matrices as before, which saves nothing and loads as stock"
FORMS = ("shared", "dense")
DAMPING_HELP = "with text: multiple of the mean of a Gram matrix's diagonal that is added to it"


@dataclass(frozen=True)
class SharedOptions:
    """Options of every method that compresses experts together; a method's own ones follow in its subclass."""

    ratio: float = required(RATIO_HELP)
    form: str = option("shared", FORM_HELP, choices=FORMS)


@dataclass(frozen=True)
class Sizes:
    """A mixture's: E experts of width F in a model of width D."""

    experts: int
    hidden: int
    width: int

    def shape(self, part: str) -> tuple[int, int]:
        """[out, in] of an expert's matrix."""
        return (self.hidden, self.width) if part == "down" else (self.width, self.hidden)

    @property
    def numbers(self) -> int:
        return 3 * self.experts * self.hidden * self.width


def numbers(entries: Entries, sizes: Sizes) -> int:
    """What one layer's experts store."""
    return sum(
        math.prod(shape)
        for part in PROJECTIONS
        for _, _, shape in expert_leaves(entries[part], sizes.experts, sizes.shape(part))
    )


def largest(make: Callable[[int], Entries], top: int, sizes: Sizes, ratio: float) -> int:
    """The largest size up to ``top`` whose entries leave at most 1 - ratio of the numbers; 0 if none does."""
    budget = (1 - ratio) * sizes.numbers
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        if numbers(make(middle), sizes) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def delta_entries(model: Model, sizes: Sizes, ratio: float) -> Entries:
    """A base and low-rank differences for all three projections, at the largest rank that the ratio allows.

    Raises:
        InputError: the bases alone are too large.
    """

    def make(rank: int) -> Entries:
        return {part: {"form": "delta", "rank": rank} for part in PROJECTIONS}

    rank = largest(make, min(sizes.hidden, sizes.width), sizes, ratio)
    if not rank:
        least = numbers(make(1), sizes) / sizes.numbers
        raise InputError(
            f"{model.folder}: no rank leaves {1 - ratio:.0%} of the experts' numbers, at least {least:.0%} are needed",
            hint="use a smaller --ratio",
        )
    return make(rank)


def plan_experts(
    models: Sequence[Model],
    options: SharedOptions,
    *,
    entries_of: Callable[[Model, Sizes], Entries],
    params: Mapping[str, Any],
    memory: Callable[[Sizes], int] = lambda sizes: 0,
    steps: int = 0,
) -> Draft:
    """The mixture with every layer's experts factorised, one unit a layer.

    Args:
        entries_of: what replaces the matrices; raises where the ratio cannot be met.
        params: what the transform needs besides ``entries``.
        steps: that a unit takes for each projection that is replaced.
        memory: bytes a unit needs beyond a float64 and a float32 copy of its experts.

    Raises:
        InputError: no mixture, or a family whose blocks the shared form cannot replace.
        UsageError: a ratio out of range.
    """
    model = one_mixture(models, "compressing", "compress")
    check_ratio(options.ratio)
    shared = options.form == "shared"
    first = mixture(model.moe_layers[0])
    sizes = Sizes(first.count, first.hidden, first.width)
    for layer in model.moe_layers:
        here = mixture(layer)
        check_expert_types(model, layer)
        if Sizes(here.count, here.hidden, here.width) != sizes:
            raise InputError(f"{model.folder}: layers have experts of several sizes")
        if shared:
            form_of_experts.check(model, layer, options.form)
    entries = entries_of(model, sizes)
    need = 40 * max(1, sizes.numbers // 3) + memory(sizes)
    tensors, units = replaced(
        model,
        lambda layer: _specs(model, layer, entries, shared),
        lambda layer: _units(layer, entries, shared, params, need, steps),
    )
    config = dict(model.config.raw)
    code: dict[str, bytes] = {}
    if shared:
        config = custom_config(model.family, config)
        config[form_of_experts.KEY] = form_of_experts.config(
            model, {layer.index: entries for layer in model.moe_layers}
        )
        code = files()
    left = numbers(entries, sizes)
    saved = f"{left:,} numbers a layer instead of {sizes.numbers:,} ({1 - left / sizes.numbers:.1%} removed)"
    notes = [
        f"the experts take {saved}"
        if shared
        else f"the factors would take {saved}; the dense form stores all of them and saves nothing",
        *([LOAD] if shared else []),
        *prediction_notes(model),
    ]
    why = (
        f"the experts of {len(model.moe_layers)} layers are replaced by products with shared parts"
    )
    return Draft(
        config,
        tensors,
        units,
        Exactness("approximate", why),
        tier="custom" if shared else "stock",
        notes=notes,
        files=code,
    )


def _specs(model: Model, layer: Layer, entries: Entries, shared: bool) -> Iterator[TensorSpec]:
    if shared:
        yield from form_of_experts.specs(model, layer, entries)
        return
    for name in mixture(layer).names:
        yield TensorSpec(name, model.dtype(name), model.whole(name).shape)


def _units(
    layer: Layer,
    entries: Entries,
    shared: bool,
    params: Mapping[str, Any],
    memory: int,
    steps: int,
) -> Iterator[Unit]:
    experts = mixture(layer)
    reads = tuple(
        experts.region(expert, part) for part in PROJECTIONS for expert in range(experts.count)
    )
    if shared:
        moves = form_of_experts.moves(layer, entries)
        writes = tuple(
            Region(f"{form_of_experts.module(experts, part)}.{leaf}", shape)
            for part in PROJECTIONS
            if entries[part]["form"] != "whole"
            for leaf, _, shape in form_of_experts.projection(experts, part, entries[part])
        )
    else:
        writes = reads
        own = {region.tensor for region in reads}
        shapes = experts.layout.shapes(experts.count, experts.hidden, experts.width)
        others = [Region(experts.prefix + name, shape) for name, shape in shapes.items()]
        moves = [(whole, [whole]) for whole in others if whole.tensor not in own]
    yield copy_unit(f"layer.{layer.index}.routing", moves, layer=layer.index)
    yield Unit(
        f"layer.{layer.index}.experts",
        "transform",
        layer.index,
        reads=reads,
        writes=writes,
        params={**params, "shared": shared, "entries": {p: dict(entries[p]) for p in PROJECTIONS}},
        memory=memory,
        steps=steps * sum(entries[part]["form"] != "whole" for part in PROJECTIONS),
    )


__all__ = [
    "DAMPING_HELP",
    "WHOLE",
    "Entries",
    "SharedOptions",
    "Sizes",
    "delta_entries",
    "largest",
    "numbers",
    "plan_experts",
]
