"""Sparse upcycling: every feed-forward becomes E copies of itself behind a new router.

Sparse Upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055). All other weights are copied byte for byte. The
router is drawn from N(0, std^2), std 0.02 by default: a row of unit variance would make routing nearly one-hot,
since normalised inputs have length sqrt(D).

The copies are identical, so the mixture is the sum of the selected weights times the dense feed-forward: it
equals the dense model exactly where the target's router normalises those weights to one, for any router and any
top-k. ``--noise`` breaks the symmetry by adding N(0, noise^2) to a random ``--noise-fraction`` of each expert's
neurons (gate and up rows, down columns), and then nothing is promised.

A target that requires a shared expert gets a narrow one whose down projection is zero: it contributes nothing,
and its first rows copy the dense feed-forward so that training can still wake it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures import families
from ...architectures.base import PROJECTIONS, Family, MoE
from ...architectures.config import Config
from ...architectures.model import Experts
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, MethodInfo, option, required

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="copy every feed-forward E times behind a new router",
    paper="arXiv:2212.05055",
    inputs="one dense model",
    data="none",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    experts: int = required("experts in every layer")
    top_k: int = option(2, "experts each token selects")
    target: str | None = option(
        None, "MoE family to write; by default the one that fits the parent"
    )
    router_std: float = option(0.02, "standard deviation of the router's random rows")
    noise: float = option(0.0, "standard deviation of noise added to the experts")
    noise_fraction: float = option(1.0, "fraction of each expert's neurons that get noise")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with a mixture in every layer.

    Raises:
        InputError: the parent fits no target, or the target cannot hold it.
        UsageError: top-k above experts, or noise settings out of range.
    """
    if len(models) != 1:
        raise InputError(f"sparse upcycling takes one dense model, {len(models)} were given")
    model = models[0]
    if model.is_moe:
        raise InputError(f"{model.folder}: is a mixture already ({model.family.model_type})")
    _check(options)
    family = _target(model, options.target)
    if family.target is None or family.moe is None:
        raise InputError(f"{family.model_type} cannot be grown from a dense model")
    raw = family.target.config(model.config, options.experts, options.top_k)
    raw.update(model_type=family.model_type, architectures=[family.class_name])
    config = Config(raw, family.defaults, "the planned config.json")
    rule = family.moe.rule(config)
    layout = family.moe.layouts[0]
    width = config.integer(family.moe.width_key)
    tensors: list[TensorSpec] = []
    units: list[Unit] = []
    mixture = {
        layer.index: Experts(layout, layer.prefix, options.experts, config.hidden, width)
        for layer in model.layers
    }
    owners = {name: layer for layer in model.layers for name in layer.names}
    ffn = {region.tensor for layer in model.layers for region in layer.ffn.values()}
    moves: dict[int | None, list[tuple[Region, list[Region]]]] = {}
    for name in model.names():
        layer = owners.get(name)
        index = layer.index if layer else None
        if name in ffn and layer is not None:
            if index in mixture and name == layer.ffn[PROJECTIONS[0]].tensor:
                tensors.extend(_mixture_specs(model, layer, mixture[layer.index], family, config))
                units.extend(_mixture_units(layer, mixture[layer.index], family, config, options))
                if not options.noise:
                    moves.setdefault(index, []).extend(_copies(layer, mixture[layer.index]))
            continue
        tensors.append(TensorSpec(name, model.dtype(name), model.checkpoint.tensors[name].shape))
        moves.setdefault(index, []).append((model.whole(name), [model.whole(name)]))
    for index, found in moves.items():
        label = "outer" if index is None else f"layer.{index}"
        units.append(copy_unit(f"{label}.copies", found, layer=index))
    units.sort(key=lambda unit: (unit.layer is None, unit.layer or 0))
    return Draft(raw, tensors, units, _exactness(options, family, rule.weights_sum_to_one))


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, perturb an expert, or fill a neutral shared expert."""
    import torch

    part = work.params["part"]
    if part == "router":
        (region,) = work.unit.writes
        draw = work.rng("router", work.layer).standard_normal(region.shape, dtype="float32")
        work.write(region, torch.from_numpy(draw) * work.params["std"])
        return {}
    if part == "shared":
        return _fill_shared(work)
    ffn = dict(zip(PROJECTIONS, work.unit.reads, strict=True))
    width = ffn["gate"].shape[0]
    rng = work.rng("noise", work.layer, work.params["expert"])
    count = round(width * work.params["fraction"])
    touched = torch.from_numpy(rng.permutation(width)[:count])
    for projection, target in zip(PROJECTIONS, work.unit.writes, strict=True):
        matrix = work.read(ffn[projection])
        columns = projection == "down"
        shape = (matrix.shape[0], count) if columns else (count, matrix.shape[1])
        noise = torch.from_numpy(rng.standard_normal(shape, dtype="float32")) * work.params["noise"]
        matrix.index_add_(1 if columns else 0, touched, noise.to(matrix.dtype))
        work.write(target, matrix)
    return {"neurons_with_noise": count}


def _check(options: Options) -> None:
    if options.experts < 1 or options.top_k < 1:
        raise UsageError("--experts and --top-k should be at least 1")
    if options.top_k > options.experts:
        raise InputError(
            f"--top-k {options.top_k} is more than --experts {options.experts}",
            hint="a token cannot select more experts than there are",
        )
    if not options.noise >= 0 or not 0 <= options.noise_fraction <= 1:
        raise UsageError("--noise should be at least 0 and --noise-fraction between 0 and 1")
    if not options.router_std > 0:
        raise UsageError("--router-std should be above 0: equal rows would send all tokens one way")


def _target(model: Model, name: str | None) -> Family:
    parent = model.family.model_type
    fitting = {
        family.model_type: family
        for family in families().values()
        if family.target is not None and parent in family.target.parents
    }
    if not fitting:
        raise InputError(f"{model.folder}: no supported MoE family holds the blocks of {parent}")
    if name is None:
        return next(iter(fitting.values()))
    if name not in fitting:
        raise InputError(
            f"{model.folder}: a {parent} model cannot become {name}: its attention differs",
            hint=f"for {parent} use --target {' or '.join(fitting)}",
        )
    return fitting[name]


def _exactness(options: Options, family: Family, sums_to_one: bool) -> Exactness:
    if options.noise and options.noise_fraction:
        return Exactness("approximate", "noise was added to the experts")
    if sums_to_one:
        return Exactness(
            "exact",
            f"identical experts, and the weights of {family.model_type}'s selected experts sum to one",
        )
    return Exactness(
        "approximate",
        f"{family.model_type} does not normalise the selected weights, so outputs shrink by their sum",
    )


def _mixture_specs(
    model: Model, layer: Layer, experts: Experts, family: Family, config: Config
) -> list[TensorSpec]:
    dtypes = {model.dtype(region.tensor) for region in layer.ffn.values()}
    if len(dtypes) > 1:
        raise InputError(
            f"{model.folder}: layer {layer.index}: the feed-forward mixes types {sorted(dtypes)}"
        )
    (dtype,) = dtypes
    shapes = dict(experts.layout.shapes(experts.count, experts.hidden, experts.width))
    shapes.update(_moe(family).shared(config))
    return [TensorSpec(layer.prefix + name, dtype, shape) for name, shape in shapes.items()]


def _copies(layer: Layer, experts: Experts) -> list[tuple[Region, list[Region]]]:
    return [
        (
            layer.ffn[projection],
            [experts.region(expert, projection) for expert in range(experts.count)],
        )
        for projection in PROJECTIONS
    ]


def _mixture_units(
    layer: Layer, experts: Experts, family: Family, config: Config, options: Options
) -> list[Unit]:
    label = f"layer.{layer.index}"
    units = [
        Unit(
            f"{label}.router",
            "transform",
            layer.index,
            writes=(experts.router,),
            params={"part": "router", "std": options.router_std},
            memory=12 * experts.count * experts.hidden,
        )
    ]
    if family.target is not None and family.target.neutral_shared:
        units.append(_shared_unit(layer, family, config, family.target.neutral_shared))
    if options.noise:
        reads = tuple(layer.ffn[projection] for projection in PROJECTIONS)
        for expert in range(experts.count):
            params: dict[str, Any] = {
                "part": "noise",
                "expert": expert,
                "noise": options.noise,
                "fraction": options.noise_fraction,
            }
            units.append(
                Unit(
                    f"{label}.expert.{expert}",
                    "transform",
                    layer.index,
                    reads=reads,
                    writes=tuple(experts.region(expert, p) for p in PROJECTIONS),
                    params=params,
                    memory=16 * experts.hidden * experts.width,
                )
            )
    return units


def _shared_unit(layer: Layer, family: Family, config: Config, names: Mapping[str, str]) -> Unit:
    shapes = _moe(family).shared(config)
    width, hidden = shapes[names["gate"]]
    return Unit(
        f"layer.{layer.index}.shared",
        "transform",
        layer.index,
        reads=tuple(layer.ffn[projection].rows(0, width) for projection in ("gate", "up")),
        writes=tuple(
            Region(layer.prefix + names[role], shapes[names[role]])
            for role in ("gate", "up", "down", "switch")
        ),
        params={"part": "shared"},
        memory=32 * width * hidden,
    )


def _fill_shared(work: Work) -> dict[str, object]:
    import torch

    gate, up, down, switch = work.unit.writes
    for source, target in zip(work.unit.reads, (gate, up), strict=True):
        work.write(target, work.read(source))
    for region in (down, switch):
        work.write(region, torch.zeros(region.shape))
    return {}


def _moe(family: Family) -> MoE:
    if family.moe is None:
        raise InputError(f"{family.model_type} has no experts")
    return family.moe
