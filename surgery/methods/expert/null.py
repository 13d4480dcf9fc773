"""Give a mixture experts that cost nothing: zero, copy and constant ones (AdaMoE, arXiv:2406.13233; MoE++,
arXiv:2410.07348).

A token that selects one of them spends less on true experts, so that top-k can be raised at no cost on average, and
tokens differ in what they spend. With E true experts and m others the router has E + m rows, in the order true,
constant, copy, zero; of the selected

    zero      0
    copy      x
    constant  a_1 x + a_2 v,   (a_1, a_2) = softmax(W_c x)

``--zero m`` alone is AdaMoE's null experts: the weights of what is selected are renormalised over the true experts,
and likewise in MoE++ over all but zero experts. ``--renormalise family`` does so where the family renormalises.

New rows are drawn from N(0, std^2), W_c as well, v from N(0, 1) as in MoE++. The function changes as soon as a
token selects a new expert. With ``--barred`` none does until the bias that bars them is raised, and nothing changes.

``--form stock`` writes zero experts as experts of zero weights, for families that do not renormalise, where that is
the same function; it costs their size.

``--router two-layer`` and ``--gating-residual`` are MoE++'s router: two layers with a tanh between, and the logits of
the mixture before as further inputs. They begin as the family's linear router (see `_moepp`), which is the default.
Deviations from MoE++: the inner layer is computed in float32 and the outer as the family does, and inputs are not
multiplied by k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...modeling import custom_config, files
from ...plan import Unit, copy_unit
from .._mixture import (
    check_expert_types,
    mixture,
    one_mixture,
    prediction_notes,
    recounted,
    replaced,
    reselected,
)
from ..base import Draft, Exactness, MethodInfo, option
from . import _moepp as moepp
from ._own import replaceable, stock_names
from ._rows import check_rows, rows_unit, write_rows
from ._slots import moves, resized, specs

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="add zero, copy and constant experts, which cost nothing",
    paper="arXiv:2406.13233, arXiv:2410.07348",
    inputs="one mixture of experts",
    data="none",
    tier="custom",
)
KEY = "moesurg_null_experts"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chooses."""

    zero: int = option(0, "experts that give nothing")
    copy: int = option(0, "experts that give the token itself")
    constant: int = option(0, "experts that mix the token with a vector of their own")
    top_k: int | None = option(None, "experts each token selects; by default as before")
    std: float = option(0.02, "standard deviation of new rows and gates")
    barred: bool = option(
        False, "keep the new experts from being selected, where the router has a bias for it"
    )
    renormalise: str = option(
        "family",
        "give the weight of zero experts to the others: as the family renormalises, yes or no",
        choices=("family", "yes", "no"),
    )
    router: str = option(
        "family",
        "the family's linear router, or MoE++'s of two layers that begins as it",
        choices=("family", "two-layer"),
    )
    gating_residual: bool = option(
        False, "add the logits of the mixture before through a matrix that begins at zero (MoE++)"
    )
    form: str = option(
        "custom",
        "custom: with model code; stock: zero experts as zero weights, where that is exact",
        choices=("custom", "stock"),
    )

    @property
    def count(self) -> int:
        return self.zero + self.copy + self.constant

    def own_router(self, model: Model) -> moepp.Router | None:
        """The routers with parts of MoE++, or None for the family's."""
        two_layer = self.router == "two-layer"
        if not two_layer and not self.gating_residual:
            return None
        layers = tuple(layer.index for layer in model.moe_layers)
        return moepp.Router(layers, two_layer, self.gating_residual, self.std)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The model with further experts that cost nothing.

    Raises:
        UsageError: nothing to add.
        InputError: no mixture, a family that cannot have them, or too large a top-k.
    """
    model = one_mixture(models, "adding null", "add null ones to")
    if min(options.zero, options.copy, options.constant) < 0 or not options.count:
        raise UsageError("there is nothing to add", hint="give --zero, --copy or --constant")
    check_rows(model, options.std, barred=options.barred)
    rule, total = model.rule, model.experts + options.count
    top_k = rule.top_k if options.top_k is None else options.top_k
    if not 1 <= top_k <= total:
        raise InputError(f"--top-k {top_k} is not between 1 and the {total} experts there are then")
    normalises = rule.renormalise or rule.score == "selected-softmax"
    sharing = normalises if options.renormalise == "family" else options.renormalise == "yes"
    exactness = Exactness("approximate", "tokens that select a new expert get less of the others")
    if options.barred and top_k == rule.top_k:
        exactness = Exactness(
            "exact", "no token selects the new experts, and weights do not see them"
        )
    notes = prediction_notes(model)
    router = options.own_router(model)
    if router is not None:
        moepp.check(model)
        if router.two_layer:
            exactness = Exactness("approximate", "tanh bends logits")
    if options.form == "stock":
        if router is not None:
            raise UsageError(
                "--router two-layer and --gating-residual need model code",
                hint="use --form custom",
            )
        _check_stock(model, options, sharing=sharing or normalises)
        tensors, units = replaced(
            model,
            lambda layer: specs(model, layer, [*range(model.experts), *[0] * options.count]),
            lambda layer: _stock_units(layer, options),
        )
        config = reselected(model, recounted(model, total), top_k)
        return Draft(config, tensors, units, exactness, notes=notes)
    place = replaceable(model, "part of a mixture with null experts")
    first = stock_names(model.moe_layers[0])
    config = custom_config(model.family, reselected(model, dict(model.config.raw), top_k))
    config[KEY] = {
        "layers": [layer.index for layer in model.moe_layers],
        "router": list(first.layout.routing_shapes(first.count, first.hidden)),
        "experts": place,
        "constant": options.constant,
        "copy": options.copy,
        "zero": options.zero,
        "renormalise": sharing,
    }
    if router is not None:
        config[moepp.KEY] = router.config(_router(model.moe_layers[0], options))
    tensors, units = replaced(
        model,
        lambda layer: _specs(model, layer, options, router),
        lambda layer: _units(layer, options, router),
    )
    return Draft(config, tensors, units, exactness, tier="custom", notes=notes, files=files())


def transform(work: Work) -> dict[str, object]:
    """Write new rows, the gates and vectors of constant experts, or experts of zero weights."""
    import torch

    if work.params["part"] == "rows":
        return write_rows(work)
    if work.params["part"] == "moepp":
        return moepp.fill(work)
    if work.params["part"] == "zeros":
        for region in work.unit.writes:
            work.write(region, torch.zeros(region.shape))
        return {}
    for region, scale in zip(work.unit.writes, (work.params["std"], 1.0), strict=True):
        name = region.tensor.rpartition(".")[2]
        drawn = work.rng(name, work.layer).standard_normal(region.shape, dtype="float32")
        work.write(region, torch.from_numpy(drawn) * scale)
    return {}


def _check_stock(model: Model, options: Options, *, sharing: bool) -> None:
    if options.copy or options.constant:
        raise InputError(
            f"{model.folder}: copy and constant experts need model code", hint="use --form custom"
        )
    if sharing:
        raise InputError(
            f"{model.folder}: {model.family.model_type} renormalises the weights of selected experts, so an expert of "
            "zero weights would still take its share",
            hint="use --form custom",
        )


def _stock_units(layer: Layer, options: Options) -> Iterator[Unit]:
    experts = mixture(layer)
    output = resized(layer, experts.count + options.count)
    yield from moves(layer, [*range(experts.count), *[None] * options.count])
    yield _new_rows(layer, output, options)
    for expert in range(experts.count, output.count):
        yield Unit(
            f"layer.{layer.index}.expert.{expert}",
            "transform",
            layer.index,
            writes=tuple(output.regions(expert).values()),
            params={"part": "zeros"},
            memory=16 * experts.hidden * experts.width,
        )


def _router(layer: Layer, options: Options) -> Experts:
    """The mixture under stock names with all rows of its router."""
    output = stock_names(layer)
    return dataclasses.replace(output, count=output.count + options.count)


def _constants(layer: Layer, options: Options) -> list[Region]:
    place = f"{layer.prefix}{mixture(layer).stock.modules[1]}"
    count, hidden = options.constant, mixture(layer).hidden
    found = [
        Region(f"{place}.constant_gates", (count, 2, hidden)),
        Region(f"{place}.constant_values", (count, hidden)),
    ]
    return found if count else []


def _specs(
    model: Model, layer: Layer, options: Options, own: moepp.Router | None
) -> Iterator[TensorSpec]:
    check_expert_types(model, layer)
    before, after, router = mixture(layer), stock_names(layer), _router(layer, options)
    shapes = router.layout.routing_shapes(router.count, router.hidden)
    for place, (old, new) in enumerate(zip(before.routing, router.routing, strict=True)):
        if own is not None and place == 0:
            yield from own.specs(model, layer, router)
            continue
        shape = shapes[new.tensor.removeprefix(layer.prefix)]
        yield TensorSpec(new.tensor, model.dtype(old.tensor), shape)
    kind = model.dtype(before.region(0, "down").tensor)
    counted = after.layout.routing_shapes(after.count, after.hidden)
    for name, shape in after.layout.shapes(after.count, after.hidden, after.width).items():
        if name not in counted:
            yield TensorSpec(layer.prefix + name, kind, shape)
    for region in _constants(layer, options):
        yield TensorSpec(region.tensor, kind, region.shape)


def _units(layer: Layer, options: Options, own: moepp.Router | None) -> Iterator[Unit]:
    before, after, router = mixture(layer), stock_names(layer), _router(layer, options)
    found = [
        (old, [new.rows(0, before.count)])
        for old, new in zip(before.routing, router.routing, strict=True)
    ][0 if own is None else 1 :]
    for expert in range(before.count):
        for part, region in before.regions(expert).items():
            found.append((region, [after.region(expert, part)]))
    yield copy_unit(f"layer.{layer.index}.experts", found, layer=layer.index)
    if own is None:
        yield _new_rows(layer, router, options)
    else:
        yield from own.units(layer, before, router, barred=options.barred)
    constants = _constants(layer, options)
    if constants:
        yield Unit(
            f"layer.{layer.index}.constants",
            "transform",
            layer.index,
            writes=tuple(constants),
            params={"part": "constants", "std": options.std},
            memory=16 * sum(region.count for region in constants),
        )


def _new_rows(layer: Layer, output: Experts, options: Options) -> Unit:
    return rows_unit(layer, output, kind="normal", std=options.std, barred=options.barred)
