"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: latent attention, sigmoid router with a selection bias, shared experts.

The layer after the last predicts a second token; stock classes leave it aside and it is passed through.
"""

from ._deepseek import MIXTURE, latent_attention, query_width
from .base import Family

FAMILY = Family(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    attention=latent_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_interleave": True,
        "attention_bias": False,
        "num_key_value_heads": 128,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "num_nextn_predict_layers": 1,
    },
    moe=MIXTURE,
    head_dim=query_width,
    prediction_layers="num_nextn_predict_layers",
)
