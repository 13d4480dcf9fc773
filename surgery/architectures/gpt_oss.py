"""gpt-oss, unquantised: experts with biases, stored transposed with gate and up interleaved, a router bias.

An expert is (clamp(up) + 1) * clamp(gate) * sigmoid(alpha * clamp(gate)) between its two projections. Published
checkpoints hold MXFP4 blocks and are refused; save them in bfloat16 first.
"""

from .base import Family, MoE, Shape, flagged_attention, selected_softmax
from .config import Config
from .layouts import ExpertLayout

STOCK = ExpertLayout(
    "fused",
    "mlp.router.weight",
    {
        "gate_up": "mlp.experts.gate_up_proj",
        "gate_up_bias": "mlp.experts.gate_up_proj_bias",
        "down": "mlp.experts.down_proj",
        "down_bias": "mlp.experts.down_proj_bias",
    },
    router_bias="mlp.router.bias",
    transposed=True,
    interleaved=True,
)


def _attention(config: Config) -> dict[str, Shape]:
    shapes = flagged_attention(config)
    shapes["self_attn.sinks"] = (config.heads,)
    return shapes


FAMILY = Family(
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    attention=_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "sliding_window": 128,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    moe=MoE(
        layouts=(STOCK,),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=selected_softmax,
        stock=STOCK,
    ),
    backend="eager",
)
