"""Granite mixtures with one ungated shared feed-forward of ``shared_intermediate_size`` neurons (0: none)."""

from ._granite import DEFAULTS, HUB, STOCK, granite_attention, granite_rule, logits_divisor
from .base import Family, MoE, Shapes
from .config import Config


def _shared(config: Config) -> Shapes:
    if config.get("shared_intermediate_size") == 0:
        return {}
    width = config.integer("shared_intermediate_size")
    return {
        "shared_mlp.input_linear.weight": (2 * width, config.hidden),
        "shared_mlp.output_linear.weight": (config.hidden, width),
    }


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
)
