"""Granite 3: Llama's block with multipliers on embedding, attention, residual and logits."""

from ._granite import DENSE_DEFAULTS, logits_divisor
from .base import Family, flagged_attention

FAMILY = Family(
    model_type="granite",
    class_name="GraniteForCausalLM",
    attention=flagged_attention,
    dense_biases=lambda config: config.flag("mlp_bias"),
    defaults={**DENSE_DEFAULTS, "mlp_bias": False},
    logits_divisor=logits_divisor,
)
