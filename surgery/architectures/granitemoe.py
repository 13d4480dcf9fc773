"""Granite 3 mixtures: Llama's attention with multipliers, experts stacked in the Hub's own names."""

from ._granite import (
    DEFAULTS,
    HUB,
    STOCK,
    from_dense,
    granite_attention,
    granite_rule,
    logits_divisor,
)
from .base import DenseTarget, Family, MoE

FAMILY = Family(
    model_type="granitemoe",
    class_name="GraniteMoeForCausalLM",
    attention=granite_attention,
    defaults=DEFAULTS,
    moe=MoE(
        layouts=(HUB, STOCK),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=granite_rule,
        stock=STOCK,
    ),
    logits_divisor=logits_divisor,
    target=DenseTarget(("granite",), from_dense),
)
