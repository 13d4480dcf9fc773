"""DeepSeek-V2 and V2-Lite: latent attention, softmax router without renormalisation, shared experts.

Stock transformers reads no ``norm_topk_prob`` for this family: a config that sets it is refused, because the model
was trained to do what the stock class would not.
"""

from ..errors import InputError
from ._deepseek import (
    after_dense_layers,
    group_limits,
    latent_attention,
    query_width,
    shared_experts,
)
from .base import Family, MoE, RouterRule, Shapes
from .config import Config
from .layouts import FUSED, PER_EXPERT


def _rule(config: Config) -> RouterRule:
    """Softmax over all experts; the best, or the best within the groups whose best expert is best."""
    if config.flag("norm_topk_prob"):
        raise InputError(
            f"{config.where}: norm_topk_prob is set, which stock transformers ignores in DeepSeek-V2"
        )
    method = config.get("topk_method")
    groups, chosen = 1, 1
    if method == "group_limited_greedy":
        groups, chosen = group_limits(config, 1)
    elif method != "greedy":
        raise InputError(
            f"{config.where}: topk_method {method!r} is unknown, expected greedy or "
            "group_limited_greedy"
        )
    return RouterRule(
        "softmax",
        config.integer("num_experts_per_tok"),
        renormalise=False,
        scaling=config.number("routed_scaling_factor", 1.0),
        groups=groups,
        top_groups=chosen,
        ordered=False,
    )


def _shared(config: Config) -> Shapes:
    found = dict(shared_experts(config))
    if config.flag("mlp_bias"):
        for name, shape in list(found.items()):
            found[name.removesuffix(".weight") + ".bias"] = shape[:1]
    return found


FAMILY = Family(
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    attention=latent_attention,
    dense_biases=lambda config: config.flag("mlp_bias"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("n_routed_experts",),
        other_keys=("num_experts",),
        width_key="moe_intermediate_size",
        rule=_rule,
        is_moe_layer=after_dense_layers,
        shared=_shared,
    ),
    head_dim=query_width,
)
