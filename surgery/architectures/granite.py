"""Granite 3: Llama's block with multipliers on embedding, attention, residual and logits."""

from ._granite import DENSE_DEFAULTS, granite_attention, logits_divisor
from .base import Family

FAMILY = Family(
    model_type="granite",
    class_name="GraniteForCausalLM",
    attention=granite_attention,
    dense_biases=lambda config: config.flag("mlp_bias"),
    defaults={**DENSE_DEFAULTS, "mlp_bias": False},
    logits_divisor=logits_divisor,
)
