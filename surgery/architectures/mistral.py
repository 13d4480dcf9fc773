"""Mistral: Llama's block without biases, with an optional sliding window."""

from .base import Family, attention_shapes

FAMILY = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    attention=attention_shapes,
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
