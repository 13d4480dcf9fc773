"""HunYuan-A13B: head norms after the rotation, renormalised softmax router, one ungated shared feed-forward."""

from collections.abc import Mapping

from ..errors import InputError
from ._hunyuan import hunyuan_attention
from .base import DenseTarget, Family, MoE, RouterRule, Shapes
from .config import Config, both_rope_spellings
from .layouts import fused, per_expert

STOCK = fused("mlp.gate.wg.weight")


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


SHARED = {
    "gate": "mlp.shared_mlp.gate_proj.weight",
    "up": "mlp.shared_mlp.up_proj.weight",
    "down": "mlp.shared_mlp.down_proj.weight",
}


def _shared(config: Config) -> Shapes:
    hidden, width = config.hidden, config.integer("intermediate_size")
    return {
        SHARED["gate"]: (width, hidden),
        SHARED["up"]: (width, hidden),
        SHARED["down"]: (hidden, width),
    }


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    config = parent.completed()
    config.update(num_experts=experts, moe_topk=top_k, output_router_logits=False)
    return both_rope_spellings(config)


def _shared_size(config: Mapping[str, object], width: int) -> dict[str, object]:
    """One config key is the width of every expert, the shared one among them."""
    if config["intermediate_size"] != width:
        raise InputError(
            f"HunYuan's shared expert is as wide as the routed ones; {width} and "
            f"{config['intermediate_size']} neurons differ",
            hint="choose routed experts of the parent's width",
        )
    return {}


FAMILY = Family(
    model_type="hunyuan_v1_moe",
    class_name="HunYuanMoEV1ForCausalLM",
    attention=hunyuan_attention,
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
        top_k_keys=("moe_topk", "num_experts_per_tok"),
        rule=_rule,
        shared=_shared,
        stock=STOCK,
    ),
    target=DenseTarget(
        ("hunyuan_v1_dense",),
        _from_dense,
        neutral_shared=SHARED,
        shared_size=_shared_size,
    ),
)
