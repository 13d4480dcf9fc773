"""Make adapters into the experts of a mixture of LoRAs: Arrow, or an X-LoRA or MixLoRA scaffold.

``--form arrow`` routes without training:

    prototype_e = leading right singular vector of B_e A_e,   score_e(x) = |x · prototype_e|,   top-k, softmax

Ostapenko et al., arXiv:2405.11157, as PEFT's ``create_arrow_model`` runs it. PEFT computes the prototypes itself when
the model is made, by power iteration from a random start. Those written to ``shared.safetensors`` ([experts, in] for
each module, float32) are exact; they tell what routing will look like, and serve loaders that can be given prototypes.
An expert of zeros has the prototype zero and is never preferred.

``--form x-lora`` is an untrained scaffold:

    scaling_e(x) = softmax_e(W h(x) + b),   h(x) the last hidden state of the base,   output: the sum of scaled experts

Buehler and Buehler, arXiv:2402.07148, as PEFT's ``XLoraModel`` runs it. The classifier (W [experts, hidden], b,
float32) is written with zeros, so that every expert counts alike, 1 / experts, until it is trained: as it stands, the
mixture is the mean of its experts. Its folder holds config and tensors under the names that PEFT loads; `shelf.json`
has the call, because PEFT wants the experts' paths and, as keys, their numbers. (PEFT 0.21 leaves the classifier out
when it saves such a model, so whoever trains one has to save its state himself.)

Both are run by PEFT, which wants the experts as plain linear layers. Arrow wants the same rank and modules everywhere:
experts are padded with zero ranks to the largest rank, and a module that an expert lacks becomes zeros there. Scales
are folded in, so that the mixture of experts trained with different alphas is what each was trained as. The output has
a folder for each expert.

``--form mixlora`` is an untrained scaffold too, for the loader of PyPI's ``mixlora`` (Li et al., arXiv:2404.15159):

    p = softmax(W h),   output: sum over the top k of p_e / (their sum) FFN_e(h),   FFN_e with adapter e's own changes

h is what the feed-forward is given. Adapters become experts of every layer's feed-forward; where an adapter lacks a
layer, its expert is the base there. All LoRAs have one rank and a scale of 1: scales are folded in, ranks padded with
ranks that contribute nothing and can be trained (A as LoRA begins, B zero). Routers W are normal with a standard
deviation of 0.02, as MixLoRA begins: with zeros every token would go to the same experts. Attention has one LoRA a
projection whatever the router says: the mean of the adapters' changes (an adapter that lacks it counts as zero),
truncated to the rank by SVD, with its error in the report; ``--rank`` of the sum of all ranks makes it exact, and
``--attention drop`` leaves attention to the base. The loader finds fault with a dropout of 0 and never turns dropout
off in experts, so the config says 1e-20, which rounds to none. It ignores ``expert_lora``, so there is none. It does
not take the activation from the base, so that is written (``--act-fn``). It looks for a router in every layer of the
base. Tensors are written twice, as safetensors and in the format of torch.save, which the loader reads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...adapters.output import Written, aligned, check_agreement, placed, widest
from ...checkpoint.formats import ADAPTER
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...outputs import config_bytes
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _mixlora, _x_lora
from . import _shelf as shelf

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work

INFO = MethodInfo(
    summary="make adapters into an Arrow mixture, routed without training, or an untrained X-LoRA or MixLoRA",
    paper="arXiv:2405.11157",
    inputs="two or more LoRA adapters of one base",
    data="none",
    takes="adapters",
)


OWN = {
    "arrow": (),
    "x-lora": ("hidden_size",),
    "mixlora": ("attention", "rank", "layers", "act_fn"),
}
"""Forms, and the options that are theirs alone."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    form: str = option(
        "arrow",
        "mixture: Arrow, or X-LoRA or MixLoRA with routers that have to be trained",
        choices=tuple(OWN),
    )
    top_k: int | None = option(
        None, "experts that a token uses; Arrow 3 by default, MixLoRA 2, X-LoRA all of them"
    )
    temperature: float = option(1.0, "temperature of the softmax over scores; not of MixLoRA")
    hidden_size: int | None = option(
        None,
        "width of the base's hidden states, for X-LoRA; by default what query, gate and up projections take",
    )
    attention: str | None = option(
        None,
        "what MixLoRA's single LoRAs of attention are: the mean of all adapters by default, or none",
        choices=("mean", "drop"),
    )
    rank: int | None = option(
        None, "rank of all of MixLoRA's LoRAs; by default the largest of the adapters"
    )
    layers: int | None = option(
        None, "decoder layers of the base, for MixLoRA; by default those that adapters change"
    )
    act_fn: str | None = option(
        None,
        "activation of the base's feed-forwards, for MixLoRA, where names of modules do not tell it",
        choices=("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"),
    )


def plan(adapters: Sequence[Adapter], options: Options) -> Draft:
    """A folder for each expert, all of one shape.

    Raises:
        InputError: fewer than two adapters, adapters that do not belong together, or modules that Arrow cannot hold.
        UsageError: an option out of range.
    """
    if len(adapters) < 2:
        raise InputError(f"a mixture needs two or more adapters, {len(adapters)} was given")
    if options.top_k is not None and options.top_k < 1:
        raise UsageError(f"--top-k {options.top_k} should be at least 1")
    if not options.temperature > 0:
        raise UsageError(f"--temperature {options.temperature} should be above 0")
    _check_own(options)
    check_agreement(adapters)
    for adapter in adapters:
        for module in adapter.modules.values():
            if module.kind != "linear" or module.bias is not None:
                raise InputError(
                    f"{adapter.folder}: module {module.name} is no plain linear layer, and mixtures take no other"
                )
        if adapter.full:
            raise InputError(f"{adapter.folder}: modules_to_save cannot be routed over")
    if options.form == "mixlora":
        return _mixlora.plan(adapters, options)
    rank = max(module.rank for adapter in adapters for module in adapter.modules.values())
    names = _names(adapters)
    rows = aligned(adapters)
    written: list[list[Written]] = [[] for _ in adapters]
    arrow = options.form == "arrow"
    units: list[Unit] = []
    routing: list[TensorSpec] = []
    for name, row in rows.items():
        model = next(module for module in row if module is not None)
        types = [
            adapters[index].checkpoint.tensors[region.tensor].dtype
            for index, module in enumerate(row)
            if module is not None
            for region in (module.down, module.up)
        ]
        entry = Written(model, rank, widest(types))
        for entries in written:
            entries.append(entry)
        region = Region(f"prototypes.{name}", (len(adapters), model.inputs))
        if arrow:
            routing.append(TensorSpec(region.tensor, "F32", region.shape))
        units.append(
            Unit(
                name,
                "transform",
                reads=tuple(
                    placed(part, index)
                    for index, module in enumerate(row)
                    if module is not None
                    for part in (module.down, module.up)
                ),
                writes=(
                    *(r for folder in names for r in shelf.place(entry, folder).regions),
                    *([region] if arrow else []),
                ),
                params={"module": name, "rank": rank, "prototypes": arrow},
                memory=64 * len(adapters) * (entry.down.count + entry.up.count),
            )
        )
    members = [
        shelf.Member(folder, entries, {"source": adapter.folder.name})
        for folder, entries, adapter in zip(names, written, adapters, strict=True)
    ]
    files = shelf.files(members, adapters)
    if arrow:
        facts = _arrow(options, names)
        notes = [
            "the routing has not been trained: Arrow needs none, but nothing here has measured it"
        ]
    else:
        folder = _free("router", names)
        config = _x_lora.config_of(options, adapters)
        facts = {**_x_lora.call(names, folder), "router": "x-lora", "router_folder": folder}
        files[f"{folder}/{ADAPTER.config}"] = config_bytes(config)
        shapes = {"weight": (len(names), config["hidden_size"]), "bias": (len(names),)}
        layer = f"{folder}/base_model.internal_xlora_classifier.layers.0"
        routing = [TensorSpec(f"{layer}.{key}", "F32", shape) for key, shape in shapes.items()]
        writes = tuple(Region(spec.name, spec.shape) for spec in routing)
        units.append(Unit("classifier", "transform", writes=writes, params={"zeros": True}))
        notes = ["the classifier is untrained: it gives every expert the same share until it is"]
    return Draft(
        shelf.listing(members, **facts, trained=False),
        [*shelf.specs(members), *routing],
        units,
        Exactness("exact", "each folder holds its adapter's own change, padded"),
        notes=notes,
        files=files,
        format="adapters",
    )


def _check_own(options: Options) -> None:
    """Refuse options of another form, and those out of range.

    Raises:
        UsageError: naming the option.
    """
    for form, names in OWN.items():
        for name in names:
            value = getattr(options, name)
            if value is None:
                continue
            flag = "--" + name.replace("_", "-")
            if options.form != form:
                raise UsageError(
                    f"{flag} is for --form {form}, which is --form {options.form} here"
                )
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{flag} {value} should be at least 1")
    if options.form == "mixlora" and options.temperature != 1:
        raise UsageError("--temperature is not for --form mixlora, whose softmax has none")


def _arrow(options: Options, names: Sequence[str]) -> dict[str, str]:
    """What ``shelf.json`` says of an Arrow mixture."""
    top_k = min(options.top_k or 3, len(names))
    call = (
        "peft.tuners.lora.create_arrow_model(base_model, task_specific_adapter_paths=["
        + ", ".join(f"FOLDER + '/{name}'" for name in names)
        + f"], arrow_config=peft.ArrowConfig(top_k={top_k}, router_temperature={options.temperature:g}, rng_seed=0))"
    )
    return {"call": call, "router": "arrow"}


def _free(name: str, taken: Sequence[str]) -> str:
    while name in taken:
        name += "_"
    return name


def transform(work: Work) -> dict[str, object]:
    """Pad one module of every expert, and find its prototypes."""
    import torch

    from ...adapters.output import read_factors
    from ...linalg.factors import svd

    params = work.params
    if "gate" in params or "part" in params:
        return _mixlora.transform(work)
    if "zeros" in params:
        for region in work.unit.writes:
            work.write(region, torch.zeros(region.shape))
        return {}
    rank, regions = params["rank"], list(work.unit.writes)
    prototypes = regions.pop() if params["prototypes"] else None
    width = next(
        a.modules[params["module"]].inputs for a in work.adapters if params["module"] in a.modules
    )
    found = torch.zeros(len(work.adapters), width, dtype=torch.float64)
    for index, adapter in enumerate(work.adapters):
        down_region, up_region = regions[2 * index : 2 * index + 2]
        down = torch.zeros(down_region.shape, dtype=torch.float64)
        up = torch.zeros(up_region.shape, dtype=torch.float64)
        module = adapter.modules.get(params["module"])
        if module is not None:
            factors = read_factors(work, module, source=index)
            own = min(rank, module.rank)
            down[:own], up[:, :own] = factors[0][0], factors[1][0]
            _, s, vt = svd(factors)
            if float(s[0, 0]) > 0:
                found[index] = vt[0, 0]
        work.write(down_region, down)
        work.write(up_region, up)
    if prototypes is not None:
        work.write(prototypes, found)
    cosines = (found @ found.T).abs()
    return {"prototype_cosines": [[round(float(value), 6) for value in row] for row in cosines]}


def _names(adapters: Sequence[Adapter]) -> list[str]:
    """A folder name for each adapter: that of its own folder, numbered where two agree."""
    plain = [
        re.sub(r"[^\w.-]", "_", Path(adapter.folder).resolve().name) or "adapter"
        for adapter in adapters
    ]
    return [
        name if plain.count(name) == 1 else f"{name}_{plain[:index].count(name)}"
        for index, name in enumerate(plain)
    ]
