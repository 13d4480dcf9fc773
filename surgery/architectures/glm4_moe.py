"""GLM-4.5 and later: grouped-query attention with optional biases and head norms, DeepSeek-V3's router and experts.

The layer after the last predicts a second token; stock classes leave it aside and it is passed through.
"""

from ._deepseek import MIXTURE
from .base import Family, attention_shapes

FAMILY = Family(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    attention=lambda config: attention_shapes(
        config,
        qkv_bias=config.flag("attention_bias"),
        qk_norm="head" if config.flag("use_qk_norm") else "none",
    ),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "num_key_value_heads": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
    moe=MIXTURE,
    prediction_layers="num_nextn_predict_layers",
)
