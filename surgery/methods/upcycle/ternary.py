"""MoTE: the dense feed-forward as a shared expert, beside routed experts of three values (arXiv:2506.14435).

    MoE(x) = F(x) + sum_i w_i(x) Q_i(x)

The shared expert is the dense feed-forward in full precision, which MoTE leaves frozen; the routed experts start as the
same feed-forward with every matrix W replaced by

    alpha * clip(round(W / alpha), -1, 1),    alpha = max(mean |W|, 1e-5)

of the whole matrix, halves rounded to even (BitNet b1.58). One of them is selected (``--top-k 1``), and its
weight is its share of the softmax over all, where the family can leave weights as they are (``norm_topk_prob``).

``--form packed`` stores four codes to a byte, an eighth of bfloat16, with model code that unpacks an expert when it is
selected, and with ``--activations int8`` rounds what it is given, and its neurons, to 8 bits a token as BitNet does.
``--form dense`` writes alpha * codes as ordinary weights, which stock classes load and which is where training
starts; its function is that of ``packed`` with ``--activations full``, number for number, because alpha is stored in
the model's own type in both.

The routed copies add to the shared expert, so the function changes: the output is F + w Q(F). ``--start zero`` gives
the routed experts a down projection of zeros, which ternary codes hold, and the dense model's function on every
router. Deviation: MoTE trains the routed experts (through latent weights and straight-through gradients); this is
its starting point. Where the family has a sigmoid gate before its shared expert, its row is zero and the down
projection doubled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...modeling import custom_config, files
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common
from . import _routers as routers

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="keep every feed-forward as a shared expert beside ternary routed experts",
    paper="arXiv:2506.14435",
    inputs="one dense model",
    data="none",
    tier="custom",
)
KEY = "moesurg_ternary_experts"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(common.RoutedOptions):
    """What the user chooses."""

    top_k: int = option(1, "experts each token selects")
    form: str = option(
        "packed",
        "packed: four codes to a byte, with model code; dense: ordinary weights for stock loaders",
        choices=("packed", "dense"),
    )
    start: str = option(
        "copy",
        "routed experts start as the ternary feed-forward, or with a down projection of zeros",
        choices=("copy", "zero"),
    )
    activations: str = option(
        "int8",
        "what packed experts are given: rounded to 8 bits a token, or as it is",
        choices=("int8", "full"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks, each feed-forward shared, with ternary routed experts beside it.

    Raises:
        InputError: no family with a shared expert holds the parent.
        UsageError: counts out of range.
    """
    model = common.one_dense(models, "ternary upcycling")
    common.check_counts(options.experts, options.top_k, options.router_std)
    routers.check(options, options.experts, options.top_k)
    neurons = model.config.integer("intermediate_size")
    mixture = _grow(model, options, neurons, {})
    if "norm_topk_prob" in mixture.raw:
        # A lone selected weight that is divided by itself is one, and teaches the router nothing.
        mixture = _grow(model, options, neurons, {"norm_topk_prob": False})
    notes = []
    if options.top_k == 1 and mixture.rule.renormalise:
        notes.append(
            f"{mixture.family.model_type} divides the one selected weight by itself, so the router has no gradient "
            "from it; use --top-k 2 to train the router"
        )
    packed = options.form == "packed"
    if packed and mixture.moe.stock.call != "routed":
        raise InputError(
            f"{model.folder}: blocks of {mixture.family.model_type} do not call their experts by index",
            hint="use --form dense",
        )
    if packed:  # custom outputs have the names of the stock modules
        experts = {
            index: dataclasses.replace(found, layout=mixture.moe.stock)
            for index, found in mixture.experts.items()
        }
        mixture = dataclasses.replace(mixture, experts=experts)

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units, moves = common.whole_shared(mixture, layer)
        units.append(routers.unit(layer, experts, options))
        for part in PROJECTIONS:
            zero = part == "down" and options.start == "zero"
            units.append(_unit(layer, experts, part, packed=packed, zero=zero))
        return units, moves

    draft = common.draft(mixture, fill, _exactness(options), notes=notes)
    draft = routers.asking(draft, options, options.experts)
    if not packed:
        return draft
    first = mixture.experts[model.layers[0].index]
    config = custom_config(mixture.family, mixture.raw)
    config[KEY] = {
        "layers": [layer.index for layer in model.layers],
        "experts": first.layout.modules[1],
        "int8": options.activations == "int8",
    }
    return dataclasses.replace(
        draft,
        config=config,
        tensors=_packed_specs(mixture, draft.tensors),
        tier="custom",
        files=files(),
    )


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Write one matrix of all experts of a layer as codes and scale, or multiplied out."""
    import torch

    from ...linalg.ternary import pack, quantise

    done = common.fill_common(work)
    if done is not None:
        return done
    matrix = work.read(work.unit.reads[0])
    codes, alpha = quantise(matrix)
    if work.params["zero"]:
        codes.zero_()
    writes = work.unit.writes
    if work.params["packed"]:
        stored, scales = writes
        work.write(stored, pack(codes).expand(stored.shape).contiguous())
        work.write(scales, torch.full(scales.shape, alpha))
    else:
        # The scale in the type it would be stored in, so that both forms are one function.
        scale = work.stored(writes[0], torch.tensor(alpha)).to(matrix.dtype)
        for region in writes:
            work.write(region, codes.to(matrix.dtype) * scale)
    norm = float(torch.linalg.vector_norm(matrix.double()))
    lost = float(torch.linalg.vector_norm(matrix.double() - alpha * codes.double()))
    zeros = float((codes == 0).double().mean())
    return {"alpha": alpha, "zeros": zeros, "relative_error": lost / norm if norm else 0.0}


def _grow(
    model: Model, options: Options, neurons: int, changes: dict[str, object]
) -> common.Mixture:
    return common.grow(
        model,
        experts=options.experts,
        top_k=options.top_k,
        target=options.target,
        width=neurons,
        shared_width=neurons,
        changes=changes,
    )


def _exactness(options: Options) -> Exactness:
    if options.start == "zero":
        reason = "the shared expert is the dense feed-forward, and routed experts add zero"
        return Exactness("exact", reason)
    return Exactness(
        "approximate", "the selected ternary experts add to the shared expert, the dense function"
    )


def _unit(layer: Layer, experts: Experts, part: str, *, packed: bool, zero: bool) -> Unit:
    source = layer.ffn[part]
    apart = [experts.region(expert, part) for expert in range(experts.count)]
    writes = _packed(experts, part) if packed else apart
    return Unit(
        f"layer.{layer.index}.experts.{part}",
        "transform",
        layer.index,
        reads=(source,),
        writes=tuple(writes),
        params={"part": "ternary", "packed": packed, "zero": zero},
        memory=40 * source.count + experts.count * source.count,
    )


def _packed(experts: Experts, part: str) -> list[Region]:
    """Codes of all experts, and their scales."""
    rows, columns = experts.region(0, part).shape
    place = f"{experts.prefix}{experts.layout.modules[1]}"
    count = experts.count
    return [
        Region(f"{place}.{part}_codes", (count, rows, -(-columns // 4))),
        Region(f"{place}.{part}_scale", (count,)),
    ]


def _packed_specs(mixture: common.Mixture, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The planned tensors with codes and scales in the place of each layer's experts."""
    found: list[TensorSpec] = []
    places = {}
    for experts in mixture.experts.values():
        routing = {region.tensor for region in experts.routing}
        for name in experts.names:
            if name not in routing:
                places[name] = experts
    done: set[str] = set()
    for spec in specs:
        if spec.name not in places:
            found.append(spec)
            continue
        experts = places[spec.name]
        if experts.prefix in done:
            continue
        done.add(experts.prefix)
        for part in PROJECTIONS:
            codes, scales = _packed(experts, part)
            found.append(TensorSpec(codes.tensor, "U8", codes.shape))
            found.append(TensorSpec(scales.tensor, spec.dtype, scales.shape))
    return found
