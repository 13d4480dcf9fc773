"""What all ways of merging models share: are they alike, the planned output, weights.

A unit is a tensor, or all matrices of one expert where a rule looks at matrices; what it does is in `_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...checkpoint.dtypes import FLOATING
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ...vocabulary import same_vocabulary
from .._alike import same_settings, same_tensors
from .._numbers import parse_numbers
from ..base import Draft, Exactness, option
from ._blocks import KEPT

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model

BLOCK = 1 << 18
"""Elements of each source that are held at a time: more would leave the processor's cache."""
MOST = 1 << 22
"""Elements near a cut that are held at most, as `selection` has it, which planning does not import."""
WIDTHS = ("F16", "BF16", "F32", "F64")
"""Types from narrow to wide."""
BASED = "a base model first, then one or more models fine-tuned from it"
"""The inputs of methods that merge changes."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What the user chooses for every merge of models."""

    weights: str | None = option(
        None,
        "comma-separated weight of each model (not of the base, where a method has one)",
        metavar="W,W,...",
    )


@dataclass(frozen=True, kw_only=True)
class ChangeOptions(MergeOptions):
    """What the user chooses for every merge of changes against a base."""

    scale: float = option(1.0, "factor of the merged change before it is added to the base")


def parse_weights(text: str | None, count: int) -> list[float]:
    """The weight of each model, 1 by default.

    Raises:
        UsageError: not finite numbers, or not one a model.
    """
    if text is None:
        return [1.0] * count
    hint = "methods that merge changes take the base first, and it has no weight"
    return parse_numbers("--weights", text, count, "models", hint=hint)


def shares(weights: Sequence[float]) -> list[float]:
    """Weights with the sum 1.

    Raises:
        UsageError: their sum is zero.
    """
    total = sum(weights)
    if not total:
        raise UsageError("--weights have the sum 0, so they cannot be normalised")
    return [weight / total for weight in weights]


def check_share(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse what is no share of one.

    Raises:
        UsageError: naming the option.
    """
    if not (0 <= value <= 1) or (value == 0 and not zero):
        raise UsageError(f"--{name} {value} should be above 0 and at most 1")


def check(models: Sequence[Model], *, least: int, based: bool) -> list[str]:
    """Refuse models that are not branches of one seed; returns what could not be compared.

    Raises:
        InputError: too few models, or what differs.
    """
    if len(models) < least:
        what = f"the base model and {least - 1} or more" if based else f"{least} or more models"
        raise InputError(
            f"{what} are merged, {len(models)} given in all",
            hint="the first source is the base" if based else None,
        )
    notes = []
    for model in models[1:]:
        same_settings(models[0], model)
        same_tensors(models[0], model, types=False)
        note = same_vocabulary(models[0].folder, model.folder)
        if note is not None:
            notes.append(note)
    if based:
        notes.append(f"the base is {models[0].folder.name}")
    return notes


def widest(dtypes: Sequence[str]) -> str:
    """The narrowest type that holds values of all of these; F16 and BF16 together need F32."""
    found = max(dtypes, key=WIDTHS.index)
    return "F32" if found == "BF16" and "F16" in dtypes else found


def plan_merge(
    models: Sequence[Model],
    params: Mapping[str, Any],
    *,
    exactness: Exactness,
    notes: Sequence[str],
    tensors: int = 4,
    matrices: Callable[[str], bool] | None = None,
    cuts: bool = False,
) -> Draft:
    """One unit for every tensor, or for every expert if the method looks at matrices.

    Args:
        models: checked sources.
        params: of every unit.
        tensors: copies of one source's block that a unit holds beside a copy of every source's.
        matrices: for methods that need whole matrices: whether a tensor of two dimensions is one to them.
        cuts: for methods that look for the largest of a tensor: they also hold what lies near the last of these.
    """
    first = models[0]
    names = names_of(first)
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    done: set[str] = set()
    held = len(models) + tensors
    if matrices is not None:
        for layer in first.moe_layers:
            made = _expert_units(layer, len(models), params, held)
            units.extend(made)
            done.update(region.tensor for unit in made for region in unit.writes)
    layer_of = {name: layer.index for layer in first.layers for name in layer.names}
    for name in names:
        whole, index = first.whole(name), layer_of.get(name)
        dtypes = [model.dtype(name) for model in models]
        if not set(dtypes) <= FLOATING:
            specs.append(TensorSpec(name, dtypes[0], whole.shape))
            units.append(copy_unit(f"copy.{name}", [(whole, [whole])], layer=index))
            continue
        specs.append(TensorSpec(name, widest(dtypes), whole.shape))
        if name in done:
            continue
        matrix = matrices is not None and len(whole.shape) == 2 and matrices(name)
        writes = (whole,) if matrix else blocks_of(whole)
        largest = max(*(region.count for region in writes), min(whole.count, KEPT))
        # A tenth of a tensor at most lies near; it is held of every source, and two copies more of one.
        near = (len(models) + 2) * min(whole.count // 10, MOST) if cuts else 0
        units.append(
            Unit(
                f"merge.{name}",
                "transform",
                index,
                reads=tuple(replace(whole, source=source) for source in range(len(models))),
                writes=writes,
                params={**params, "matrix": matrix},
                memory=8 * (held * largest + near) + (1 << 20),
            )
        )
    config = dict(first.checkpoint.config)
    stored = next(spec.dtype for spec in specs if spec.name == first.family.embedding)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}.get(
                stored, "float64"
            )
    return Draft(config, specs, units, exactness, notes=list(notes))


def plan_changes(
    models: Sequence[Model],
    options: ChangeOptions,
    *,
    what: str,
    tensors: int = 4,
    cuts: bool = False,
) -> Draft:
    """The plan of a rule on changes that keeps a share ``density`` of them: base plus merged changes.

    Every option is a parameter of the units.

    Args:
        what: is done with the changes, for the promise about the output.
        tensors: copies of a block beside two of every source's.
        cuts: see `plan_merge`.

    Raises:
        InputError: models that are not alike.
        UsageError: an option out of range.
    """
    notes = check(models, least=2, based=True)
    params = asdict(options)
    check_share("density", params["density"])
    params["weights"] = parse_weights(options.weights, len(models) - 1)
    return plan_merge(
        models,
        params,
        exactness=Exactness("approximate", f"changes of fine-tunes are {what}"),
        notes=notes,
        tensors=2 * len(models) + tensors,
        cuts=cuts,
    )


def names_of(model: Model) -> list[str]:
    """The tensors of the output: a head that is tied is not stored."""
    return [n for n in model.names() if not (model.config.tied and n == model.family.head)]


def blocks_of(whole: Region) -> tuple[Region, ...]:
    """A tensor cut into runs of whole rows."""
    rows = whole.shape[0] if whole.shape else 1
    step = max(1, BLOCK * rows // max(1, whole.count))
    if step >= rows:
        return (whole,)
    return tuple(whole.rows(start, min(rows, start + step)) for start in range(0, rows, step))


def _expert_units(layer: Layer, sources: int, params: Mapping[str, Any], held: int) -> list[Unit]:
    """A unit for every expert, so that parts that are stored interleaved meet in one unit."""
    if layer.experts is None:
        return []
    units = []
    for expert in range(layer.experts.count):
        regions = tuple(layer.experts.regions(expert).values())
        units.append(
            Unit(
                f"merge.{layer.index}.expert.{expert}",
                "transform",
                layer.index,
                reads=tuple(replace(r, source=s) for r in regions for s in range(sources)),
                writes=regions,
                params={**params, "matrix": True},
                memory=8 * (held + 2) * max(region.count for region in regions),
            )
        )
    return units
