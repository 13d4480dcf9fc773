"""Cohere 2 mixtures: Cohere 2's parallel block with a mixture in the feed-forward's place.

Mixtures whose first layers are dense are refused: those layers have another width and another attention pattern.
"""

from collections.abc import Mapping
from typing import Literal

from ..errors import InputError
from ._cohere import DEFAULTS, cohere_attention, logits_divisor
from .base import PROJECTIONS, DenseTarget, Family, MoE, RouterRule, Shapes
from .config import Config, both_rope_spellings, whole_experts
from .layouts import FUSED, PER_EXPERT

SHARED = {role: f"mlp.shared_experts.{role}_proj.weight" for role in PROJECTIONS}


def _rule(config: Config) -> RouterRule:
    """The largest logits, and the softmax or the sigmoids of those alone."""
    name = config.get("expert_selection_fn")
    if name not in ("softmax", "sigmoid"):
        raise InputError(
            f"{config.where}: expert_selection_fn should be softmax or sigmoid, is {name!r}"
        )
    score: Literal["selected-softmax", "sigmoid"] = (
        "selected-softmax" if name == "softmax" else "sigmoid"
    )
    return RouterRule(
        score,
        config.integer("num_experts_per_tok"),
        renormalise=score == "sigmoid" and config.flag("norm_topk_prob"),
        cast_weights=True,
    )


def _is_moe_layer(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if config.get("first_k_dense_replace") or (isinstance(kinds, list) and "dense" in kinds):
        raise InputError(f"{config.where}: Cohere 2 mixtures with dense layers are not supported")
    return True


def _shared(config: Config) -> Shapes:
    count = config.get("num_shared_experts") or 0
    if not isinstance(count, int) or count < 0:
        raise InputError(f"{config.where}: num_shared_experts should be a count, is {count!r}")
    width, hidden = count * config.integer("intermediate_size"), config.hidden
    if not count:
        return {}
    return {
        SHARED["gate"]: (width, hidden),
        SHARED["up"]: (width, hidden),
        SHARED["down"]: (hidden, width),
    }


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    config = parent.completed()
    pattern = config.pop("sliding_window_pattern", 4)
    if config.get("layer_types") is None:
        if type(pattern) is not int or pattern < 1:
            raise InputError(
                f"{parent.where}: sliding_window_pattern should be a count, is {pattern!r}"
            )
        config["layer_types"] = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(parent.layers)
        ]
    # Stock derives it for Cohere 2 and reads it from the file for the mixture.
    config["head_dim"] = parent.hidden // parent.heads
    config.update(
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_shared_experts=0,
        expert_selection_fn="softmax",
        mlp_layer_types=["sparse"] * parent.layers,
        output_router_logits=False,
    )
    return both_rope_spellings(config)


def _shared_size(config: Mapping[str, object], width: int) -> dict[str, object]:
    """The shared expert is as wide as a whole number of routed ones, and added to them."""
    count = whole_experts(config, "intermediate_size", width, "Cohere 2")
    return {"num_shared_experts": count, "shared_expert_combination_strategy": "sum"}


FAMILY = Family(
    model_type="cohere2_moe",
    class_name="Cohere2MoeForCausalLM",
    attention=cohere_attention,
    defaults={
        **DEFAULTS,
        "head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 0,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_experts",),
        width_key="intermediate_size",
        rule=_rule,
        is_moe_layer=_is_moe_layer,
        shared=_shared,
    ),
    target=DenseTarget(("cohere2",), _from_dense, neutral_shared=SHARED, shared_size=_shared_size),
    logits_divisor=logits_divisor,
)
