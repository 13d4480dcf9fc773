"""A dense model from a mixture: every layer's experts averaged into one feed-forward.

    G = sum_e q_e G_e[p_e],   U = sum_e q_e U_e[p_e],   D = m sum_e q_e D_e[:, p_e]

with q summing to one and p_e the permutation of expert e's neurons that brings it closest to the expert of largest
q (one linear assignment over all three matrices, as in M-SMoE; ``--no-align`` takes neurons as they lie). The
weights q are

    uniform     1 / E
    frequency   the share of all selections that are the expert's, on the calibration text
    gate        the share of all weight that the router gives it, on the calibration text

and m is 1, or with ``gate`` the weight that a token's experts have in all, which is 1 where the router normalises.

Ungated shared experts are part of every token's output: their neurons stand beside the averaged ones in a wider
feed-forward. One behind a sigmoid gate is taken at the gate's value for a row of zeros, 1/2 (``--shared drop`` leaves
either out).

The dense family is one of which the mixture's own family holds attention, norms and embeddings unchanged, and whose
config becomes this mixture's config again if it is grown (``--target`` chooses where there are several). Growing by
copies and averaging them is the dense model again. The average of experts that were trained apart is a starting point
for training and no replacement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures import families
from ...architectures.base import PROJECTIONS, Family
from ...architectures.config import Config, both_rope_spellings
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from .._alike import UNRELATED
from .._mixture import check_expert_types, mixture, one_mixture, replaced
from ..base import Draft, Exactness, MethodInfo, option

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Layer, Model
    from ...calibration.statistics import Statistics
    from ...execute import Work

INFO = MethodInfo(
    summary="average the experts of every layer into a dense model",
    paper="",
    inputs="one mixture of experts",
    data="none",
)

_OF_MIXTURES = re.compile(
    r"expert|moe|router|topk|top_k|n_group|sparse_step|mlp_only|first_k_dense|routed|aux|mlp_layer|shared_inter"
)
"""Config keys that only mixtures have."""


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    weights: str = option(
        "uniform",
        "of the experts in the average: equal, or by their selections or gates on text",
        choices=("uniform", "frequency", "gate"),
    )
    align: bool = option(True, "match neurons to those of the weightiest expert first")
    shared: str = option(
        "keep",
        "shared experts: keep their neurons beside the averaged ones, or drop them",
        choices=("keep", "drop"),
    )
    target: str | None = option(None, "dense family to write; by default the first that fits")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The dense model.

    Raises:
        InputError: no mixture, no dense family that fits, layers of several widths, or experts that are no plain
            feed-forwards.
    """
    model = one_mixture(models, "averaging", "average")
    experts = mixture(model.moe_layers[0])
    if experts.layout.parts != PROJECTIONS or model.rule.scales_input or model.prediction_names():
        raise InputError(
            f"{model.folder}: experts of {model.family.model_type} are no plain feed-forwards of a dense model"
        )
    keep = options.shared == "keep"
    shared = _shared(model, "") if keep else {}
    width = experts.width + (shared["gate"].shape[0] if shared else 0)
    for layer in model.layers:
        check = layer.experts is None and layer.ffn["gate"].shape[0] != width
        if check:
            raise InputError(
                f"{model.folder}: layer {layer.index} has a feed-forward of {layer.ffn['gate'].shape[0]} neurons and "
                f"others would have {width}; dense families have one width"
            )
        if layer.experts is not None:
            check_expert_types(model, layer)
    family, config = _dense_family(model, width, options.target)
    dropped = {name for layer in model.layers for name in layer.shared}
    tensors, units = replaced(
        model,
        lambda layer: _specs(model, layer, family, width),
        lambda layer: [_unit(model, layer, family, width, keep, options)],
        without=dropped,
    )
    return Draft(
        config,
        tensors,
        units,
        Exactness("approximate", "one feed-forward stands for all experts"),
        data=None if options.weights == "uniform" else "routed",
    )


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Each layer's weights in the average, and the weight of a token's experts in all.

    Raises:
        InputError: the statistics saw no token.
    """
    decided = {}
    for layer in model.moe_layers:
        found = statistics.layer(layer.index)
        sums = found.count_E if options.weights == "frequency" else found.gate_E
        tokens, total = float(found.tokens), float(sums.sum())
        if not tokens or not total > 0:
            raise InputError(
                f"layer {layer.index}: the statistics saw no token; calibrate on some text"
            )
        decided[str(layer.index)] = {
            "weights": [float(value) / total for value in sums],
            "mass": total / tokens if options.weights == "gate" else 1.0,
        }
    return decided


def transform(work: Work) -> dict[str, object]:
    """Average a layer's experts, beside its shared expert's neurons."""
    import torch

    params = work.params
    experts = params["experts"]
    weights, mass = [1.0 / experts] * experts, 1.0
    if work.decision is not None:
        weights, mass = work.decision["weights"], work.decision["mass"]
    reads = work.unit.reads
    parts = [reads[expert * 3 : expert * 3 + 3] for expert in range(experts)]
    averaged, moved = _average(work, parts, weights, align=params["align"])
    averaged[2] *= mass
    if params["shared"]:
        for place, region in enumerate(reads[3 * experts : 3 * experts + 3]):
            whole = work.read(region).double()
            if place == 2:
                whole *= params["factor"]
            averaged[place] = torch.cat([whole, averaged[place]], dim=1 if place == 2 else 0)
    for region, tensor in zip(work.unit.writes, averaged, strict=True):
        work.write(region, tensor)
    return moved


def _average(
    work: Work, parts: Sequence[Sequence[Region]], weights: Sequence[float], *, align: bool
) -> tuple[list[torch.Tensor], dict[str, object]]:
    """Weighted means of gate, up and down in float64, one expert in memory at a time."""
    from ...linalg.permutation import align as match

    first = max(range(len(weights)), key=lambda expert: (weights[expert], -expert))

    def read(expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gate, up, down = (work.read(region) for region in parts[expert])
        return gate, up, down

    reference = read(first)
    total = [weights[first] * matrix.double() for matrix in reference]
    before = after = 0.0
    for expert in range(len(parts)):
        if expert == first or not weights[expert]:
            continue
        gate, up, down = read(expert)
        if align:
            found = match(
                (reference[0].float(), reference[1].float(), reference[2].float()),
                (gate.float(), up.float(), down.float()),
            )
            order = found.order_F
            gate, up, down = gate[order], up[order], down[:, order]
            before, after = max(before, found.before), max(after, found.after)
        for matrix, summed in zip((gate, up, down), total, strict=True):
            summed.add_(matrix, alpha=weights[expert])
    return total, {"distance_before": before, "distance_after": after} if align else {}


def _shared(model: Model, prefix: str) -> dict[str, Region]:
    """The parts of a layer's shared expert by role; nothing where there is none.

    Raises:
        InputError: a shared expert whose parts are not known one by one.
    """
    moe, target = model.family.moe, model.family.target
    shapes = {} if moe is None else moe.shared(model.config)
    if not shapes:
        return {}
    found = {} if target is None else target.shared_parts(prefix, shapes)
    if {prefix + name for name in shapes} != {region.tensor for region in found.values()}:
        raise InputError(
            f"{model.folder}: shared experts of {model.family.model_type} cannot be put beside others",
            hint="--shared drop leaves them out",
        )
    return found


def _dense_family(model: Model, width: int, wanted: str | None) -> tuple[Family, dict[str, object]]:
    """The dense family, and the config in it.

    Raises:
        InputError: none fits, or not the one that is wanted.
    """
    target = model.family.target
    parents = [] if target is None else list(target.parents)
    if wanted is not None and wanted not in parents:
        raise InputError(
            f"{model.folder}: {model.family.model_type} cannot become {wanted}",
            hint=f"it can become {' or '.join(parents)}" if parents else "no dense family fits it",
        )
    reasons = []
    for name in [wanted] if wanted else parents:
        family = families()[name]
        config = _config(model, family, width)
        reason = _differs(model, family, config)
        if not reason:
            return family, config
        reasons.append(f"{name}: {reason}")
    why = "; ".join(reasons) or "no supported dense family has its blocks"
    raise InputError(f"{model.folder}: {model.family.model_type} cannot become dense ({why})")


def _config(model: Model, family: Family, width: int) -> dict[str, object]:
    kept = {
        key: value
        for key, value in _without_windows(model.config.completed()).items()
        if not _OF_MIXTURES.search(key)
    }
    kept.update(model_type=family.model_type, architectures=[family.class_name])
    kept[family.dense_width_key] = width
    if "sliding_window" not in kept and family.defaults.get("sliding_window"):
        kept["sliding_window"] = None  # Mistral slides unless it is told not to
    return both_rope_spellings(kept)


def _without_windows(config: Mapping[str, object]) -> dict[str, object]:
    """A config without the settings of windows that it does not use."""
    unused = "use_sliding_window" in config and not config["use_sliding_window"]
    dropped = ("sliding_window", "max_window_layers", "use_sliding_window", "layer_types")
    return {key: value for key, value in config.items() if not unused or key not in dropped}


def _differs(model: Model, family: Family, raw: Mapping[str, object]) -> str:
    """Why a dense config does not stand for the mixture's blocks; empty if it grows into them again."""
    config = Config(raw, family.defaults, "the planned config.json")
    if dict(family.attention(config)) != dict(model.family.attention(model.config)):
        return "its attention or norms differ"
    target = model.family.target
    if target is None:
        return "it is no target of dense models"
    try:
        grown = target.config(config, model.experts, model.rule.top_k)
    except InputError as error:
        return error.message
    grown = _without_windows(both_rope_spellings({**model.family.defaults, **grown}))
    ours = _without_windows(both_rope_spellings(model.config.completed()))
    skipped = {*UNRELATED, "model_type", family.dense_width_key}
    for key in sorted(set(ours) | set(grown)):
        if key in skipped or _OF_MIXTURES.search(key):
            continue
        if (ours.get(key) or None) != (grown.get(key) or None):
            return f"{key} would be {grown.get(key)!r} instead of {ours.get(key)!r}"
    return ""


def _targets(layer: Layer, family: Family, hidden: int, width: int) -> list[Region]:
    prefix = family.prefix.format(layer=layer.index)
    return [
        Region(
            prefix + family.dense_ffn[part], (hidden, width) if part == "down" else (width, hidden)
        )
        for part in PROJECTIONS
    ]


def _specs(model: Model, layer: Layer, family: Family, width: int) -> Iterator[TensorSpec]:
    experts = mixture(layer)
    for part, region in zip(
        PROJECTIONS, _targets(layer, family, experts.hidden, width), strict=True
    ):
        yield TensorSpec(region.tensor, model.dtype(experts.region(0, part).tensor), region.shape)


def _unit(
    model: Model,
    layer: Layer,
    family: Family,
    width: int,
    keep: bool,
    options: Options,
) -> Unit:
    experts = mixture(layer)
    reads = [
        experts.region(expert, part) for expert in range(experts.count) for part in PROJECTIONS
    ]
    shared = _shared(model, layer.prefix) if keep else {}
    reads += [shared[role] for role in PROJECTIONS if shared]
    size = experts.hidden * experts.width
    return Unit(
        f"layer.{layer.index}.ffn",
        "transform",
        layer.index,
        reads=tuple(reads),
        writes=tuple(_targets(layer, family, experts.hidden, width)),
        params={
            "experts": experts.count,
            "align": options.align,
            "shared": bool(shared),
            "factor": 0.5 if "switch" in shared else 1.0,
        },
        # The sum in float64, reference and expert, both again in float32, and the score of all pairs of neurons.
        memory=72 * size + 24 * experts.hidden * width + 20 * experts.width**2,
    )
