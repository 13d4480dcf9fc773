"""Llama (and SmolLM2, and every other checkpoint that says ``llama``): dense, pre-norm, rotary, SwiGLU."""

from .base import Family, flagged_attention

FAMILY = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    attention=flagged_attention,
    dense_biases=lambda config: config.flag("mlp_bias"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
