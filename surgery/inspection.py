"""What a model is, told from its config and headers alone: nothing is instantiated, no weight is read."""

from __future__ import annotations

from pathlib import Path

from . import methods
from .architectures import families
from .architectures.base import Family, RouterRule
from .architectures.config import Config
from .architectures.model import Layer, Model
from .checkpoint.formats import MODEL
from .checkpoint.hub import resolve
from .custom import is_custom_folder
from .errors import InputError
from .inspection_facts import count, dtypes, provenance, shards
from .progress import Progress, Silent

COMPONENTS = (
    "embedding",
    "head",
    "attention",
    "norms",
    "dense_ffn",
    "router",
    "experts",
    "shared",
    "other",
)
"""What parameters are counted under; ``other`` holds stored buffers and copies, which count in no total."""


def inspect(
    source: str,
    calibration: Path | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> dict[str, object]:
    """The facts of a model.

    Parameters active per token count the embedding and the head whole, as published figures do, and of the
    routed experts the share that a token selects. A tied head is not counted twice.

    Args:
        source: a folder or a Hub id.
        calibration: a statistics folder of this model, to say more of its experts; reads their weights, too.
        progress: told of that reading.
        folder: where the source lies, if that is known.

    Raises:
        InputError: the checkpoint is bad or unsupported, as `Model.open` finds it.
    """
    folder = resolve(source) if folder is None else folder
    if is_custom_folder(folder):
        from .inspection_custom import inspect_custom

        return inspect_custom(source, folder, calibration)
    model = Model.open(folder)
    counts = _component_counts(model)
    total = sum(count for component, count in counts.items() if component != "other")
    routed = counts["experts"]
    active = total - routed
    if model.is_moe:
        active += routed * model.rule.top_k // model.experts
        active -= sum(_idle_attention(model, layer) for layer in model.layers)
    record: dict[str, object] = {
        "format": MODEL.name,
        "source": source,
        "folder": str(model.folder),
        "family": model.family.model_type,
        "class": model.family.class_name,
        "support": _support(model),
        "layers": model.config.layers,
        "tied_embeddings": model.config.tied,
        "widths": _widths(model),
        "parameters": {
            "total": total,
            "active_per_token": active,
            "components": {name: counts[name] for name in COMPONENTS if counts[name]},
        },
        "dtypes": dtypes(model.checkpoint),
        "bytes": sum(info.nbytes for info in model.checkpoint.tensors.values()),
        "tensors": len(model.checkpoint.tensors),
        "shards": shards(model.checkpoint),
    }
    if model.is_moe:
        record["moe"] = _moe(model)
        record["per_layer"] = [_layer_row(model, layer) for layer in model.layers]
    else:
        record["upcycle_targets"] = _targets(model)
    record["methods"] = [
        {"command": method.command, "name": method.name, "summary": method.info.summary}
        for method in methods.methods()
        if method.info.fits(mixture=model.is_moe)
    ]
    if calibration is not None:
        # Only here: the rest needs neither numpy nor torch.
        from .analysis import analyse
        from .calibration.statistics import Statistics

        if not model.is_moe:
            raise InputError(f"{model.folder}: {model.family.model_type} has no experts to analyse")
        record["analysis"] = analyse(model, Statistics.open(calibration), progress or Silent())
    origin = provenance(model.folder)
    if origin is not None:
        record["provenance"] = origin
    return record


def _support(model: Model) -> dict[str, str]:
    """What can be done with a model of this family."""
    name = model.family.model_type
    if model.is_moe:
        return {"tier": "mixture", "sentence": f"{name}: its experts can be merged"}
    grown = [family.model_type for family in _parents(name)]
    if grown:
        return {"tier": "parent", "sentence": f"{name}: can be upcycled to {' or '.join(grown)}"}
    return {"tier": "readable", "sentence": f"{name}: can be inspected and evaluated"}


def _parents(model_type: str) -> list[Family]:
    """The families that can hold this dense model's blocks."""
    return [
        family
        for _, family in sorted(families().items())
        if family.target is not None and model_type in family.target.parents
    ]


def _widths(model: Model) -> dict[str, int]:
    config, moe = model.config, model.family.moe
    found = {
        "hidden": config.hidden,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": model.family.head_dim(config),
        "vocabulary": config.vocab,
    }
    if any(layer.ffn for layer in model.layers):
        found["dense_ffn"] = config.integer(model.family.dense_width_key)
    if moe is not None:
        found["expert"] = config.integer(moe.width_key)
        leaves = ("down_proj.weight", "output_linear.weight")
        downs = [shape for name, shape in moe.shared(config).items() if name.endswith(leaves)]
        if downs:
            found["shared_expert"] = downs[0][1]
    return found


def _components(model: Model) -> dict[str, str]:
    """What every tensor counts under."""
    family = model.family
    component = {family.embedding: "embedding", family.final_norm: "norms"}
    component |= {family.final_norm_bias: "norms", family.head_bias_name: "head"}
    component[family.head] = "other" if model.config.tied else "head"
    for layer in model.layers:
        component.update(_layer_components(layer))
    return component


def _component_counts(model: Model) -> dict[str, int]:
    tensors, component = model.checkpoint.tensors, _components(model)
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, info in tensors.items():
        counts[component.get(name, "other")] += count(info.shape)
    return counts


def _layer_components(layer: Layer) -> dict[str, str]:
    ffn = {region.tensor for region in layer.ffn.values()}
    ffn |= {name.removesuffix(".weight") + ".bias" for name in ffn}
    routed = set(layer.experts.names) if layer.experts else set()
    router = {region.tensor for region in layer.experts.routing} if layer.experts else set()
    correction = layer.experts.correction if layer.experts else None
    found = {}
    for name in layer.names:
        if correction is not None and name == correction.tensor:
            found[name] = "other"
        elif name in router:
            found[name] = "router"
        elif name in routed:
            found[name] = "experts"
        elif name in layer.shared:
            found[name] = "shared"
        elif name in ffn:
            found[name] = "dense_ffn"
        else:
            found[name] = "norms" if "norm" in name.rsplit(".", 2)[-2] else "attention"
    return found


def _moe(model: Model) -> dict[str, object]:
    rule = model.rule
    return {
        "layers": len(model.moe_layers),
        "experts": model.experts,
        "top_k": rule.top_k,
        "layout": model.layout.kind if model.layout else None,
        "router": {
            "score": rule.score,
            "renormalise": rule.renormalise,
            "scaling": rule.scaling,
            "groups": rule.groups,
            "selection_bias": bool(model.layout and model.layout.correction),
            "sentence": _rule_sentence(rule),
        },
        "identical_experts": _identical(rule),
    }


def _rule_sentence(rule: RouterRule) -> str:
    if rule.score == "selected-softmax":
        parts = [f"top {rule.top_k} logits", "softmax over those"]
    elif rule.score == "selected-sigmoid":
        parts = [f"top {rule.top_k} logits", "sigmoid of each"]
    elif rule.score == "sparsemixer":
        parts = ["sparsemixer: each of the top 2 with its softmax over the logits near it"]
    else:
        score = "softmax over all experts" if rule.score == "softmax" else "sigmoid of each logit"
        parts = [score, f"top {rule.top_k}"]
        parts.append("divided by their sum" if rule.renormalise else "not renormalised")
    if rule.groups > 1:
        parts.append(f"within the best {rule.top_groups} of {rule.groups} groups")
    if rule.scaling != 1.0:
        parts.append(f"times {rule.scaling:g}")
    if rule.scales_input:
        parts.append("on what the experts are given")
    return ", ".join(parts)


def _identical(rule: RouterRule) -> dict[str, object]:
    """Whether copies of one feed-forward as experts compute that feed-forward."""
    if rule.weights_sum_to_one:
        reason = "the weights of the selected experts sum to one, so identical experts act as one"
    elif rule.renormalise or rule.score == "selected-softmax":
        reason = f"the weights of the selected experts sum to {rule.scaling:g}, not to one"
    else:
        reason = "the weights of the selected experts are not renormalised and do not sum to one"
    return {"reproduce_dense": rule.weights_sum_to_one, "reason": reason}


def _targets(model: Model) -> list[dict[str, object]]:
    """The families a dense model can be grown into, and why not where it cannot."""
    found: list[dict[str, object]] = []
    for family in _parents(model.family.model_type):
        if family.target is None or family.moe is None:
            continue
        try:
            raw = family.target.config(model.config, 2, 2)
        except InputError as error:
            found.append({"family": family.model_type, "possible": False, "reason": error.message})
            continue
        rule = family.moe.rule(Config(raw, family.defaults, family.model_type))
        row = {"family": family.model_type, "possible": True, **_identical(rule)}
        shapes = family.moe.shared(Config(raw, family.defaults, family.model_type))
        added = {r: name for r, name in family.target.neutral_shared.items() if name in shapes}
        if added:
            row["adds_shared_expert"] = added
        found.append(row)
    return found


def _layer_row(model: Model, layer: Layer) -> dict[str, object]:
    component = _layer_components(layer)
    counted = [name for name in layer.names if component[name] != "other"]
    sizes = {name: count(model.checkpoint.tensors[name].shape) for name in counted}
    row: dict[str, object] = {"layer": layer.index, "kind": "dense", "experts": 0, "top_k": 0}
    total = sum(sizes.values())
    active = total
    if layer.experts is not None:
        routed = sum(size for name, size in sizes.items() if component[name] == "experts")
        active = total - routed + routed * model.rule.top_k // layer.experts.count
        active -= _idle_attention(model, layer)
        row.update(kind="moe", experts=layer.experts.count, top_k=model.rule.top_k)
        row["width"] = layer.experts.width
        row["shared"] = sum(sizes[name] for name in layer.shared)
    else:
        row["width"] = model.config.integer(model.family.dense_width_key)
        row["shared"] = 0
    infos = (model.checkpoint.tensors[name] for name in layer.names)
    row.update(parameters=total, active=active, bytes=sum(info.nbytes for info in infos))
    row["dtypes"] = sorted({model.dtype(name) for name in layer.names})
    return row


def _idle_attention(model: Model, layer: Layer) -> int:
    """Parameters of a layer's attention that belong to experts which a token does not select."""
    names = [layer.prefix + name for name in model.family.attention_experts]
    routed = sum(count(model.checkpoint.tensors[name].shape) for name in names)
    return routed - routed * model.rule.top_k // model.experts if routed else 0
