"""HunYuan-A13B: head norms after the rotation, renormalised softmax router, one ungated shared feed-forward."""

from ..errors import InputError
from .base import Family, MoE, RouterRule, Shape, Shapes, attention_shapes
from .config import Config
from .layouts import fused, per_expert

STOCK = fused("mlp.gate.wg.weight")


def _attention(config: Config) -> dict[str, Shape]:
    biased = config.flag("attention_bias")
    shapes = attention_shapes(config, qkv_bias=biased, output_bias=biased)
    shapes["self_attn.query_layernorm.weight"] = (config.head_dim,)
    shapes["self_attn.key_layernorm.weight"] = (config.head_dim,)
    return shapes


def _rule(config: Config) -> RouterRule:
    """``moe_topk`` may be a list, one number a layer; they have to agree."""
    top_k = config.get("moe_topk")
    if isinstance(top_k, list):
        if len(set(top_k)) != 1 or not all(type(value) is int and value > 0 for value in top_k):
            raise InputError(
                f"{config.where}: moe_topk gives layers different numbers of experts, which is not "
                f"supported ({top_k})"
            )
        return RouterRule("softmax", top_k[0], renormalise=True)
    return RouterRule("softmax", config.integer("moe_topk"), renormalise=True)


def _shared(config: Config) -> Shapes:
    hidden, width = config.hidden, config.integer("intermediate_size")
    return {
        "mlp.shared_mlp.gate_proj.weight": (width, hidden),
        "mlp.shared_mlp.up_proj.weight": (width, hidden),
        "mlp.shared_mlp.down_proj.weight": (hidden, width),
    }


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    class_name="HunYuanMoEV1ForCausalLM",
    attention=_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "num_experts": 1,
        "moe_topk": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    moe=MoE(
        layouts=(per_expert("mlp.gate.wg.weight"), STOCK),
        expert_keys=("num_experts",),
        other_keys=("num_local_experts",),
        width_key="intermediate_size",
        rule=_rule,
        shared=_shared,
        stock=STOCK,
    ),
)
