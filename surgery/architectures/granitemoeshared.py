"""Granite mixtures with one ungated shared feed-forward of ``shared_intermediate_size`` neurons (0: none)."""

from ._granite import (
    DEFAULTS,
    HUB,
    STOCK,
    from_dense,
    granite_attention,
    granite_rule,
    logits_divisor,
)
from .base import DenseTarget, Family, MoE, Shapes
from .config import Config

SHARED = {
    "gate_up": "shared_mlp.input_linear.weight",
    "down": "shared_mlp.output_linear.weight",
}


def _shared(config: Config) -> Shapes:
    if config.get("shared_intermediate_size") == 0:
        return {}
    width = config.integer("shared_intermediate_size")
    return {
        SHARED["gate_up"]: (2 * width, config.hidden),
        SHARED["down"]: (config.hidden, width),
    }


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    return {**from_dense(parent, experts, top_k), "shared_intermediate_size": 0}


FAMILY = Family(
    model_type="granitemoeshared",
    class_name="GraniteMoeSharedForCausalLM",
    attention=granite_attention,
    defaults={**DEFAULTS, "shared_intermediate_size": 0},
    moe=MoE(
        layouts=(HUB, STOCK),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=granite_rule,
        shared=_shared,
        stock=STOCK,
    ),
    logits_divisor=logits_divisor,
    # The residual multiplier is on the sum of both parts, as it is on the dense feed-forward.
    target=DenseTarget(
        ("granite",),
        _from_dense,
        SHARED,
        lambda raw, width: {"shared_intermediate_size": width},
    ),
)
