"""dots.llm1: attention with head norms, DeepSeek-V3's router and experts, sliding windows in later layers."""

from ._deepseek import MIXTURE
from .base import Family, flagged_attention

FAMILY = Family(
    model_type="dots1",
    class_name="Dots1ForCausalLM",
    attention=lambda config: flagged_attention(config, qk_norm="head"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    },
    moe=MIXTURE,
)
