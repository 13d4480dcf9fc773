"""Cohere 2 (Command R7B and A): attention and feed-forward side by side below one norm without bias."""

from ._cohere import DEFAULTS, cohere_attention, logits_divisor
from .base import Family

FAMILY = Family(
    model_type="cohere2",
    class_name="Cohere2ForCausalLM",
    attention=cohere_attention,
    defaults=DEFAULTS,
    logits_divisor=logits_divisor,
)
