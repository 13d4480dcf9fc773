"""MiniMax-M2: norms as wide as the query and key projections, sigmoid router with a selection bias."""

from .base import Family, MoE, RouterRule, attention_shapes
from .layouts import fused, per_expert

STOCK = fused(correction="mlp.e_score_correction_bias")

FAMILY = Family(
    model_type="minimax_m2",
    class_name="MiniMaxM2ForCausalLM",
    attention=lambda config: attention_shapes(config, qk_norm="full"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 196608,
        "rope_theta": 5000000.0,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "num_local_experts": 256,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
    },
    moe=MoE(
        layouts=(
            per_expert(
                "block_sparse_moe.gate.weight",
                "block_sparse_moe.experts",
                leaves=("w1", "w3", "w2"),
                correction="block_sparse_moe.e_score_correction_bias",
            ),
            STOCK,
        ),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=lambda config: RouterRule(
            "sigmoid", config.integer("num_experts_per_tok"), renormalise=True, ordered=False
        ),
        stock=STOCK,
    ),
)
