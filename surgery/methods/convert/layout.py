"""Store the experts of a mixture one tensor a matrix (``per-expert``) or all of a layer in one (``fused``).

Most families exist in two layouts: their published checkpoints hold three tensors an expert, and transformers 5 holds,
and can save, two tensors a layer, ``gate_up_proj`` [E, 2F, D] with the gate rows above the up rows, and ``down_proj``
[E, D, F]. Loaders, converters and fine-tuning tools understand one or the other. Bytes are moved and nothing is
computed: converting there and back gives every tensor's bytes again. The router and what counts experts beside it
(biases, selection biases) take the names of the new layout.

Experts that are fused must be stored in one type. Layers that predict further tokens, which stock classes leave aside,
keep their layout. Families that exist in one layout only are refused: gpt-oss, whose loaders know only its transposed
and interleaved tensors, for one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...checkpoint.layout import TensorSpec
from ...errors import InputError
from ...plan import Unit, copy_unit
from .._mixture import mixture, one_mixture, prediction_notes, replaced
from ..base import Draft, Exactness, MethodInfo, required

if TYPE_CHECKING:
    from ...architectures.layouts import ExpertLayout
    from ...architectures.model import Experts, Layer, Model
    from ...checkpoint.region import Region
    from ...execute import Work

INFO = MethodInfo(
    summary="store experts one tensor a matrix, or all of a layer in one",
    paper="",
    inputs="one mixture of experts",
    data="none",
)

LAYOUTS = ("per-expert", "fused")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    layout: str = required(
        "how the output stores experts: three tensors each, or two a layer", choices=LAYOUTS
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The same model under the names of the other layout.

    Raises:
        InputError: no mixture, one that is stored so already, or one whose loaders know no other layout.
    """
    model = one_mixture(models, "converting", "convert")
    target = _target(model, options.layout)
    tensors, units = replaced(
        model,
        lambda layer: _specs(model, layer, target),
        lambda layer: [_unit(layer, target)],
    )
    return Draft(
        dict(model.config.raw),
        tensors,
        units,
        Exactness("bitwise", "the same numbers, in other tensors"),
        notes=prediction_notes(model),
    )


def transform(work: Work) -> dict[str, object]:
    """Nothing: every unit moves bytes."""
    return {}


def _target(model: Model, kind: str) -> ExpertLayout:
    layouts = [] if model.family.moe is None else model.family.moe.layouts
    name = model.family.model_type
    if model.layout is not None and model.layout.kind == kind:
        raise InputError(f"{model.folder}: its experts are stored {kind} already")
    found = [layout for layout in layouts if layout.kind == kind]
    if not found:
        known = " or ".join(sorted({layout.kind for layout in layouts}))
        raise InputError(
            f"{model.folder}: loaders of {name} know its experts {known} only, not {kind}"
        )
    return found[0]


def _specs(model: Model, layer: Layer, target: ExpertLayout) -> Iterator[TensorSpec]:
    experts = mixture(layer)
    output = dataclasses.replace(experts, layout=target)
    dtypes: dict[str, str] = {}
    for read, written in _moves(experts, output):
        dtype = model.dtype(read.tensor)
        known = dtypes.setdefault(written.tensor, dtype)
        if known != dtype:
            raise InputError(
                f"{model.folder}: tensor {read.tensor!r} is stored as {dtype}, others that would share "
                f"{written.tensor!r} with it as {known}",
                hint="store all experts of a layer in one type first",
            )
    for name, shape in target.shapes(experts.count, experts.hidden, experts.width).items():
        yield TensorSpec(layer.prefix + name, dtypes[layer.prefix + name], shape)


def _unit(layer: Layer, target: ExpertLayout) -> Unit:
    experts = mixture(layer)
    output = dataclasses.replace(experts, layout=target)
    moves = [(read, [written]) for read, written in _moves(experts, output)]
    return copy_unit(f"layer.{layer.index}.experts", moves, layer=layer.index)


def _moves(experts: Experts, output: Experts) -> Iterator[tuple[Region, Region]]:
    yield from zip(experts.routing, output.routing, strict=True)
    for expert in range(experts.count):
        for part, read in experts.regions(expert).items():
            yield read, output.region(expert, part)
