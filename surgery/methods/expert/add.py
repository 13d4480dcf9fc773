"""Append experts to a mixture: copies of its own, or the feed-forwards of dense models.

    E' = E + c + n    for c copies (--copy) and n dense models given after the mixture

A dense model's feed-forward of layer i becomes an expert of layer i. It has to have the mixture's widths, activation
and number of layers and its vocabulary. New rows of the router are those of the copied experts (``--rows copy``),
drawn from N(0, std^2) (``normal``) or zero, which no dense model's expert has until it is trained.

When the result is the same function:

* ``--barred``: the new experts' entries of a bias that counts for the selection alone are -1e9, so no token selects
  them until that bias is raised. For routers whose scores do not depend on each other (sigmoid with a selection
  bias, or the softmax of the selected logits with a router bias); others are refused.
* every expert copied equally often, with ``--rows copy``, and k multiplied by the same number: a token selects its
  experts with all of their copies, and each expert's weight is spread over them. Not where each selected score is a
  weight of its own.
* copies alone where tokens select one expert, whose weight is one.

Elsewhere new experts take part at once: a copy whose row is the original's is selected together with it, in the
place of another expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ...vocabulary import same_vocabulary
from .._mixture import mixture, one_mixture, prediction_notes, recounted, replaced, reselected
from ..base import Draft, Exactness, MethodInfo, option
from ._rows import check_rows, rows_unit, write_rows
from ._slots import moves, resized, specs
from ._which import parse_numbers

if TYPE_CHECKING:
    from ...architectures.model import Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="append copies of experts, or feed-forwards of dense models",
    paper="",
    inputs="one mixture of experts, then any number of dense models",
    data="none",
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    copy: str | None = option(
        None, "experts to append copies of, such as 0,3 or 0-7", metavar="LIST"
    )
    times: int = option(1, "copies of each")
    rows: str = option(
        "copy",
        "new rows of the router; copy: the copied expert's, drawn for a dense model's",
        choices=("copy", "normal", "zero"),
    )
    std: float = option(0.02, "standard deviation of drawn rows")
    barred: bool = option(
        False, "keep the new experts from being selected, where the router has a bias for it"
    )
    top_k: int | None = option(None, "experts each token selects; by default as before")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The mixture with further experts.

    Raises:
        UsageError: nothing to add, or a list that names what is not there.
        InputError: no mixture, a dense model that does not fit, or a router that cannot take more rows.
    """
    if not models:
        raise InputError("adding experts takes a mixture of experts")
    model, dense = one_mixture(models[:1], "adding", "add to"), list(models[1:])
    copied = [] if options.copy is None else parse_numbers(options.copy, "--copy")
    if options.times < 1:
        raise UsageError(f"--times should be at least 1, is {options.times}")
    copied = copied * options.times
    _check(model, dense, copied, options)
    notes = prediction_notes(model)
    for other in dense:
        notes.extend(_check_dense(model, other))
    count = model.experts + len(copied) + len(dense)
    top_k = model.rule.top_k if options.top_k is None else options.top_k
    if not 1 <= top_k <= count:
        raise InputError(f"--top-k {top_k} is not between 1 and the {count} experts there are then")
    chosen = [*range(model.experts), *copied, *(0 for _ in dense)]
    tensors, units = replaced(
        model,
        lambda layer: specs(model, layer, chosen),
        lambda layer: _units(layer, copied, dense, options),
    )
    return Draft(
        reselected(model, recounted(model, count), top_k),
        tensors,
        units,
        _exactness(model, copied, dense, top_k, options),
        notes=notes,
    )


def transform(work: Work) -> dict[str, object]:
    """Write new rows of the router, or an expert from a dense model."""
    if work.params["part"] == "dense":
        for source, target in zip(work.unit.reads, work.unit.writes, strict=True):
            work.write(target, work.read(source))
        return {}
    return write_rows(work)


def _units(
    layer: Layer, copied: Sequence[int], dense: Sequence[Model], options: Options
) -> Iterator[Unit]:
    experts = mixture(layer)
    first = experts.count + len(copied)
    output = resized(layer, first + len(dense))
    places = [*range(experts.count), *copied, *(None for _ in dense)]
    yield from moves(layer, places, routed=experts.count)
    yield rows_unit(
        layer,
        output,
        kind=options.rows,
        std=options.std,
        barred=options.barred,
        taken=copied,
    )
    for number, model in enumerate(dense):
        ffn = model.layers[layer.index].ffn
        yield Unit(
            f"layer.{layer.index}.expert.{first + number}",
            "transform",
            layer.index,
            reads=tuple(dataclasses.replace(ffn[part], source=number + 1) for part in PROJECTIONS),
            writes=tuple(output.region(first + number, part) for part in PROJECTIONS),
            params={"part": "dense"},
            memory=36 * experts.hidden * experts.width,
        )


def _check(model: Model, dense: Sequence[Model], copied: Sequence[int], options: Options) -> None:
    if not copied and not dense:
        raise UsageError(
            "there is nothing to add", hint="give --copy, or dense models after the mixture"
        )
    for expert in copied:
        if expert >= model.experts:
            raise UsageError(
                f"--copy: there is no expert {expert}, the last is {model.experts - 1}"
            )
    check_rows(model, options.std, barred=options.barred)


def _check_dense(model: Model, other: Model) -> list[str]:
    """Refuse a dense model whose feed-forwards are no experts of the mixture."""
    if other.is_moe:
        raise InputError(
            f"{other.folder}: is a mixture ({other.family.model_type}); only dense models are added"
        )
    layout = mixture(model.moe_layers[0]).layout
    if layout.parts != PROJECTIONS or model.rule.scales_input:
        raise InputError(
            f"{model.folder}: experts of {model.family.model_type} are no plain feed-forwards, so a dense model's "
            "cannot be one"
        )
    for what in ("hidden", "layers"):
        ours, theirs = getattr(model.config, what), getattr(other.config, what)
        if ours != theirs:
            raise InputError(f"{other.folder}: {what} is {theirs}, {model.folder} has {ours}")
    width = mixture(model.moe_layers[0]).width
    ffn = other.layers[0].ffn
    if set(ffn) != set(PROJECTIONS) or other.family.dense_biases(other.config):
        raise InputError(f"{other.folder}: its feed-forwards have biases or no gate")
    if ffn["gate"].shape[0] != width:
        raise InputError(
            f"{other.folder}: its feed-forwards have {ffn['gate'].shape[0]} neurons, experts of {model.folder} "
            f"{width}"
        )
    ours, theirs = model.config.get("hidden_act"), other.config.get("hidden_act")
    if ours != theirs:
        raise InputError(f"{other.folder}: hidden_act is {theirs!r}, {model.folder} has {ours!r}")
    note = same_vocabulary(model.folder, other.folder)
    return [] if note is None else [note]


def _exactness(
    model: Model, copied: Sequence[int], dense: Sequence[Model], top_k: int, options: Options
) -> Exactness:
    rule = model.rule
    if options.barred and top_k == rule.top_k:
        return Exactness("exact", "no token selects the new experts, and weights do not see them")
    times, rest = divmod(len(copied), model.experts)
    everyone = (
        not dense
        and not rest
        and all(copied.count(expert) == times for expert in range(model.experts))
    )
    spreads = rule.renormalise or rule.score in ("softmax", "selected-softmax")
    if (
        everyone
        and options.rows == "copy"
        and spreads
        and rule.score != "sparsemixer"
        and top_k == (times + 1) * rule.top_k
    ):
        return Exactness(
            "exact",
            f"a token selects its experts with all {times + 1} copies, which share the weight",
        )
    if (
        not dense
        and options.rows == "copy"
        and rule.top_k == top_k == 1
        and rule.weights_sum_to_one
    ):
        return Exactness("exact", "a token selects an expert or its copy, with a weight of one")
    return Exactness("approximate", "new experts take part in the routing at once")
