"""Phi-3.5-MoE: layer norms with biases, two experts a token chosen and weighted by sparsemixer."""

from ..errors import InputError
from .base import Family, MoE, RouterRule, Shape, flagged_attention
from .config import Config
from .layouts import fused, per_expert

STOCK = fused("mlp.router.weight")


def _attention(config: Config) -> dict[str, Shape]:
    shapes = flagged_attention(config)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{norm}.bias"] = (config.hidden,)
    return shapes


def _rule(config: Config) -> RouterRule:
    top_k = config.integer("num_experts_per_tok")
    if top_k != 2:
        raise InputError(
            f"{config.where}: num_experts_per_tok is {top_k}, and sparsemixer is for 2 experts only"
        )
    jitter = config.number("router_jitter_noise", 0.01)
    return RouterRule("sparsemixer", 2, renormalise=False, jitter=jitter)


FAMILY = Family(
    model_type="phimoe",
    class_name="PhimoeForCausalLM",
    attention=_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "lm_head_bias": False,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    moe=MoE(
        layouts=(
            per_expert(
                "block_sparse_moe.gate.weight",
                "block_sparse_moe.experts",
                leaves=("w1", "w3", "w2"),
            ),
            STOCK,
        ),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=_rule,
        stock=STOCK,
    ),
    norm_bias=True,
    head_bias=lambda config: config.flag("lm_head_bias"),
)
