"""What every way of growing a mixture shares: the target, its config, tensors that pass through, routers, and the
neutral shared expert of families that require one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS, DenseTarget, Family, MoE, RouterRule, Shape
from ...architectures.config import Config
from ...architectures.model import Experts
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, option, required
from ._fill import fill_common as fill_common
from ._routers import RouterOptions
from ._targets import check_width, choose

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model

Moves = list[tuple[Region, list[Region]]]
"""What is read, with everywhere it goes byte for byte."""


@dataclass(frozen=True, kw_only=True)
class GrowOptions:
    """What the user chooses for every method that grows one dense model."""

    experts: int = required("experts in every layer")
    top_k: int = option(2, "experts each token selects")
    target: str | None = option(
        None, "MoE family to write; by default the one that fits the parent"
    )
    router_std: float = option(0.02, "standard deviation of the router's random rows")


@dataclass(frozen=True, kw_only=True)
class RoutedOptions(GrowOptions, RouterOptions):
    """The same, with a choice of routers."""


@dataclass(frozen=True)
class Mixture:
    """The planned mixture.

    Attributes:
        model: the dense parent (the first of several).
        family, moe, target: facts of the family that is written.
        raw, config: the planned ``config.json``, as values and read with the family's defaults.
        rule: the planned router.
        experts: the planned experts by layer.
    """

    model: Model
    family: Family
    moe: MoE
    target: DenseTarget
    raw: dict[str, object]
    config: Config
    rule: RouterRule
    experts: Mapping[int, Experts]

    @property
    def width(self) -> int:
        """Width of a planned expert."""
        return self.config.integer(self.moe.width_key)

    def shared(self, layer: Layer) -> dict[str, Region]:
        """The shared expert's ``gate``, ``up``, ``down`` and, where it has one, ``switch``; or nothing."""
        return self.target.shared_parts(layer.prefix, self.moe.shared(self.config))


def one_dense(models: Sequence[Model], method: str) -> Model:
    """The one dense source.

    Raises:
        InputError: several sources, or a mixture.
    """
    if len(models) != 1:
        raise InputError(f"{method} takes one dense model, {len(models)} were given")
    dense(models[0])
    return models[0]


def dense(model: Model) -> None:
    """Refuse a source that holds experts already."""
    if model.is_moe:
        raise InputError(f"{model.folder}: is a mixture already ({model.family.model_type})")


def check_counts(experts: int, top_k: int, router_std: float = 1.0) -> None:
    """Refuse counts that no mixture has.

    Raises:
        UsageError: a count below one, or a router without randomness.
        InputError: top-k above experts.
    """
    if experts < 1 or top_k < 1:
        raise UsageError("--experts and --top-k should be at least 1")
    if top_k > experts:
        raise InputError(
            f"--top-k {top_k} is more than --experts {experts}",
            hint="a token cannot select more experts than there are",
        )
    if not router_std > 0:
        raise UsageError("--router-std should be above 0: equal rows would send all tokens one way")


def grow(
    model: Model,
    *,
    experts: int,
    top_k: int,
    target: str | None,
    width: int | None = None,
    shared_width: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> Mixture:
    """The mixture that a dense model becomes.

    Args:
        model: the dense parent.
        experts, top_k: routed experts per layer, and how many a token selects.
        target: the family to write, or None for the first that fits.
        width: of an expert, by default the parent's.
        shared_width: of the shared expert, and then only families that have one fit; by default a family
            without one is preferred and one that requires it gets its neutral width.
        changes: further config values.

    Raises:
        InputError: the parent fits no target, or the target cannot hold it.
    """
    family, moe, facts = choose(model, target, sharing=shared_width is not None)
    raw = facts.config(model.config, experts, top_k)
    raw.update(model_type=family.model_type, architectures=[family.class_name])
    if width is not None:
        raw[moe.width_key] = width
    if shared_width is not None and facts.shared_size is not None:
        raw.update(facts.shared_size(raw, shared_width))
    raw.update(changes or {})
    config = Config(raw, family.defaults, "the planned config.json")
    found = config.integer(moe.width_key)
    if width is not None:
        check_width(model, found)
    mixtures = {
        layer.index: Experts(moe.layouts[0], layer.prefix, experts, config.hidden, found)
        for layer in model.layers
    }
    return Mixture(model, family, moe, facts, raw, config, moe.rule(config), mixtures)


def draft(
    mixture: Mixture,
    fill: Callable[[Layer, Experts], tuple[list[Unit], Moves]],
    exactness: Exactness,
    *,
    keep: Callable[[str, int | None], list[Unit]] | None = None,
    shapes: Mapping[str, Shape] | None = None,
    notes: Sequence[str] = (),
) -> Draft:
    """The parent's blocks with a mixture in the place of every feed-forward.

    Args:
        mixture: from `grow`.
        fill: units and byte moves that write the whole mixture of a layer.
        exactness: what is promised.
        keep: units that write a tensor outside the feed-forwards; by default it is copied.
        shapes: of tensors outside the feed-forwards that change theirs.
        notes: sentences for plan and report.
    """
    model, shapes = mixture.model, shapes or {}
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    owners = {name: layer for layer in model.layers for name in layer.names}
    ffn = {region.tensor for layer in model.layers for region in layer.ffn.values()}
    moves: dict[int | None, Moves] = {}
    for name in model.names():
        layer = owners.get(name)
        index = layer.index if layer else None
        if name in ffn and layer is not None:
            if name == layer.ffn[PROJECTIONS[0]].tensor:
                tensors.extend(_specs(mixture, layer))
                experts = mixture.experts[layer.index]
                own, copies = fill(layer, experts)
                units.extend([*own, *_bias_units(layer, experts)])
                moves.setdefault(index, []).extend(copies)
            continue
        shape = shapes.get(name, model.checkpoint.tensors[name].shape)
        tensors.append(TensorSpec(name, model.dtype(name), shape))
        if keep is None:
            moves.setdefault(index, []).append((model.whole(name), [model.whole(name)]))
        else:
            units.extend(keep(name, index))
    for index, found in moves.items():
        if found:
            label = "outer" if index is None else f"layer.{index}"
            units.append(copy_unit(f"{label}.copies", found, layer=index))
    units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    return Draft(mixture.raw, tensors, units, exactness, notes=notes)


def neutral_units(mixture: Mixture, layer: Layer) -> list[Unit]:
    """The unit that fills a required shared expert so that it contributes nothing; none where none is required."""
    shared = mixture.shared(layer)
    if not shared:
        return []
    width, hidden = shared["gate"].shape
    return [
        Unit(
            f"layer.{layer.index}.shared",
            "transform",
            layer.index,
            reads=tuple(layer.ffn[projection].rows(0, width) for projection in ("gate", "up")),
            writes=tuple(shared.values()),
            params={"part": "neutral"},
            memory=32 * width * hidden,
        )
    ]


def whole_shared(mixture: Mixture, layer: Layer) -> tuple[list[Unit], Moves]:
    """The whole feed-forward as the shared expert: units and byte moves.

    A sigmoid gate in front of it gets a row of zeros, which is 1/2 for every token, and the down projection is
    doubled, which costs no rounding.
    """
    shared = mixture.shared(layer)
    moves: Moves = [(layer.ffn[role], [shared[role]]) for role in ("gate", "up")]
    if "switch" not in shared:
        return [], [*moves, (layer.ffn["down"], [shared["down"]])]
    unit = Unit(
        f"layer.{layer.index}.shared",
        "transform",
        layer.index,
        reads=(layer.ffn["down"],),
        writes=(shared["down"], shared["switch"]),
        params={"part": "double"},
        memory=16 * layer.ffn["down"].count,
    )
    return [unit], moves


def copies(layer: Layer, experts: Experts) -> Moves:
    """The whole feed-forward into every expert."""
    return [
        (
            layer.ffn[projection],
            [experts.region(expert, projection) for expert in range(experts.count)],
        )
        for projection in PROJECTIONS
    ]


def identical_experts(mixture: Mixture) -> Exactness:
    """What identical experts of the parent's width promise: sum of the selected weights times the parent."""
    if mixture.rule.weights_sum_to_one:
        return Exactness(
            "exact",
            f"identical experts, and the weights of {mixture.family.model_type}'s selected experts sum to one",
        )
    return Exactness(
        "approximate",
        f"{mixture.family.model_type} does not normalise the selected weights, so outputs shrink by their sum",
    )


def _bias_units(layer: Layer, experts: Experts) -> list[Unit]:
    """The unit that writes what a family adds to the router's scores, which starts at zero; none where none is."""
    biases = tuple(experts.routing[1:])
    if not biases:
        return []
    name = f"layer.{layer.index}.router_bias"
    return [Unit(name, "transform", layer.index, writes=biases, params={"part": "zeros"})]


def _specs(mixture: Mixture, layer: Layer) -> list[TensorSpec]:
    model = mixture.model
    dtypes = {model.dtype(region.tensor) for region in layer.ffn.values()}
    if len(dtypes) > 1:
        raise InputError(
            f"{model.folder}: layer {layer.index}: the feed-forward mixes types {sorted(dtypes)}"
        )
    (dtype,) = dtypes
    experts = mixture.experts[layer.index]
    shapes: dict[str, Any] = dict(
        experts.layout.shapes(experts.count, experts.hidden, experts.width)
    )
    shapes.update(mixture.moe.shared(mixture.config))
    return [TensorSpec(layer.prefix + name, dtype, shape) for name, shape in shapes.items()]
