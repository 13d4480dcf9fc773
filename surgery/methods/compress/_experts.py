"""The machinery of methods that compress a mixture's experts together: sizes, ranks, the planned output, writing.

Gate, up and down are replaced by an entry each (`_entries.py`), the same in every layer. It decides the tensors of the
``shared`` form; the ``dense`` form writes the matrices these stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...architectures.base import PROJECTIONS
from ...architectures.linears import expert_input
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...modeling import custom_config, files
from ...plan import Unit, copy_unit
from .._forms import check_expert_types
from .._mixture import mixture, one_mixture, prediction_notes, replaced
from ..base import Draft, Exactness, option, required
from . import _expert_form as form_of_experts
from ._entries import expert_leaves
from ._expert_form import LOAD, WHOLE, Entries
from ._options import check_ratio

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Layer, Model
    from ...execute import Work

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


class Found(Protocol):
    """What a method makes of one projection of all experts of a layer."""

    def weight(self, expert: int) -> torch.Tensor:
        """The matrix [out, in] an expert is left with."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the shared form stores, by leaf name."""


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


def matrices(work: Work, part: str) -> list[torch.Tensor]:
    """One projection [out, in] of every expert of the unit's layer, float32."""
    experts = mixture(work.model.layers[work.layer])
    return [work.read(experts.region(expert, part)) for expert in range(experts.count)]


def grams(work: Work, part: str) -> list[torch.Tensor | None] | None:
    """The Gram matrix of every expert's inputs of one projection; None where the run has no text.

    Gate and up all have the mixture's. An expert that no token chose has None for down.
    """
    if work.decision is None:
        return None
    from ...calibration.gram_folder import Grams

    folder = Grams.open(work.statistics)
    count = mixture(work.model.layers[work.layer]).count
    if part != "down":
        gram, _ = folder.read(work.layer, expert_input())
        return [gram] * count
    found: list[torch.Tensor | None] = []
    for expert in range(count):
        gram, rows = folder.read(work.layer, expert_input(expert))
        found.append(gram if rows else None)
    return found


def write_experts(
    work: Work,
    found: Mapping[str, Found],
    originals: Callable[[str, int], torch.Tensor] | None = None,
) -> dict[str, object]:
    """Write the experts in the unit's form; what is not in ``found`` stays as it is.

    Args:
        originals: what the error is measured against; the stored matrices if None (not right where neurons were
            moved).

    Returns:
        ``error``: relative Frobenius distance from the originals by projection.
    """
    import torch

    experts = mixture(work.model.layers[work.layer])
    shared = work.params["shared"]
    errors: dict[str, float] = {}
    for part in PROJECTIONS:
        made = found.get(part)
        lost = total = 0.0
        for expert in range(experts.count):
            region = experts.region(expert, part)
            if made is None:
                if not shared:
                    work.write(region, work.read(region))
                continue
            before = originals(part, expert) if originals is not None else work.read(region)
            after = made.weight(expert)
            lost += float(torch.linalg.vector_norm(after - before.double()) ** 2)
            total += float(torch.linalg.vector_norm(before, dtype=torch.float64) ** 2)
            if not shared:
                work.write(region, after)
        if made is not None:
            errors[part] = (lost / total) ** 0.5 if total else 0.0
            if shared:
                for leaf, tensor in made.tensors().items():
                    name = f"{form_of_experts.module(experts, part)}.{leaf}"
                    work.write(Region(name, tuple(tensor.shape)), tensor)
    return {"error": errors}


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
    "grams",
    "largest",
    "matrices",
    "numbers",
    "plan_experts",
    "write_experts",
]
