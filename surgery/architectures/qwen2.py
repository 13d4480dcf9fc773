"""Qwen2 and Qwen2.5: Llama's block with biases on query, key and value."""

from .base import Family, attention_shapes

QWEN_DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
"""What all Qwen2 and Qwen3 configs share."""

FAMILY = Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    attention=lambda config: attention_shapes(config, qkv_bias=True),
    defaults={**QWEN_DEFAULTS, "num_key_value_heads": 32, "max_window_layers": 28},
)
