"""Granite 3 mixtures: Llama's attention with multipliers, experts stacked in the Hub's own names."""

from ._granite import DEFAULTS, MIXTURE, from_dense, logits_divisor
from .base import DenseTarget, Family, flagged_attention

FAMILY = Family(
    model_type="granitemoe",
    class_name="GraniteMoeForCausalLM",
    attention=flagged_attention,
    defaults=DEFAULTS,
    moe=MIXTURE,
    logits_divisor=logits_divisor,
    target=DenseTarget(("granite",), from_dense),
)
