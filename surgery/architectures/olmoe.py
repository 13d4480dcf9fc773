"""OLMoE: norms as wide as the query and key projections, softmax top-k without renormalisation by default."""

from ._qwen import qwen_rule
from .base import Family, MoE, flagged_attention
from .layouts import FUSED, PER_EXPERT

FAMILY = Family(
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    attention=lambda config: flagged_attention(config, qk_norm="full"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "norm_topk_prob": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "pad_token_id": 1,
        "eos_token_id": 50279,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_experts", "num_local_experts"),
        width_key="intermediate_size",
        rule=qwen_rule,
    ),
)
