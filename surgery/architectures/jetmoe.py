"""JetMoE: a mixture of attention beside that of feed-forwards, both with as many experts and as many per token.

An attention expert is a query and an output projection around keys and values that all of them share. One number in
the config counts the experts of both mixtures, so that a stock checkpoint cannot have fewer feed-forwards alone.
"""

from __future__ import annotations

from .base import Family, MoE, Shape, selected_softmax
from .config import Config
from .layouts import ExpertLayout

STOCK = ExpertLayout(
    "fused",
    "mlp.router.layer.weight",
    {"gate_up": "mlp.input_linear.weight", "down": "mlp.output_linear.weight"},
    call="sorted",
)


def _experts(config: Config) -> int:
    return config.integer("num_local_experts", "num_experts")


def _attention(config: Config) -> dict[str, Shape]:
    hidden, experts = config.hidden, _experts(config)
    heads = config.integer("kv_channels") * config.kv_heads
    return {
        "input_layernorm.weight": (hidden,),
        "self_attention.experts.bias": (hidden,),
        "self_attention.experts.input_linear.weight": (experts, heads, hidden),
        "self_attention.experts.output_linear.weight": (experts, hidden, heads),
        "self_attention.experts.router.layer.weight": (experts, hidden),
        "self_attention.kv_proj.weight": (2 * heads, hidden),
        "post_attention_layernorm.weight": (hidden,),
    }


FAMILY = Family(
    model_type="jetmoe",
    class_name="JetMoeForCausalLM",
    attention=_attention,
    defaults={
        "activation_function": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "num_key_value_heads": 16,
        "kv_channels": 128,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    moe=MoE(
        layouts=(STOCK,),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=selected_softmax,
        # What every token gets beside its experts: a constant.
        shared=lambda config: {"mlp.bias": (config.hidden,)},
        stock=STOCK,
        fixed_count="one number in its config counts the experts of attention too",
    ),
    attention_experts=(
        "self_attention.experts.input_linear.weight",
        "self_attention.experts.output_linear.weight",
    ),
    head_dim=lambda config: config.integer("kv_channels"),
)
