"""Qwen3, dense: per-head norms on query and key, no biases unless the config says so."""

from .base import Family, flagged_attention
from .qwen2 import QWEN_DEFAULTS

FAMILY = Family(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    attention=lambda config: flagged_attention(config, qk_norm="head"),
    defaults={
        **QWEN_DEFAULTS,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_window_layers": 28,
        "attention_bias": False,
    },
)
