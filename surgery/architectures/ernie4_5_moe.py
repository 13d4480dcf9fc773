"""ERNIE-4.5: softmax router with a selection bias stored as [1, E], shared experts, some layers dense.

What the checkpoint holds for predicting further tokens (``mtp``) stock classes leave aside; it is passed through.
"""

from collections.abc import Mapping

from ..errors import InputError
from .base import PROJECTIONS, DenseTarget, Family, MoE, RouterRule, Shapes, flagged_attention
from .config import Config, both_rope_spellings, refuse_flag, whole_experts
from .layouts import fused, per_expert

CORRECTION = "moe_statics.e_score_correction_bias"
STOCK = fused(correction=f"mlp.gate.{CORRECTION}", correction_rank=2)


def _rule(config: Config) -> RouterRule:
    return RouterRule(
        "softmax",
        config.integer("moe_k"),
        renormalise=True,
        cast_weights=True,
        least_sum=config.number("moe_norm_min", 1e-12),
    )


def _count(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{config.where}: {key} should be an integer, is {value!r}")
    return value


def _is_moe_layer(config: Config, layer: int) -> bool:
    last = _count(config, "moe_layer_end_index")
    if last == -1:
        last = config.layers - 1
    within = _count(config, "moe_layer_start_index") <= layer <= last
    return within and (layer + 1) % config.integer("moe_layer_interval") == 0


def _shared(config: Config) -> Shapes:
    count = _count(config, "moe_num_shared_experts")
    if count == 0:
        return {}
    width, hidden = count * config.integer("moe_intermediate_size"), config.hidden
    found: dict[str, tuple[int, ...]] = {}
    for leaf, outputs, inputs in (
        ("gate_proj", width, hidden),
        ("up_proj", width, hidden),
        ("down_proj", hidden, width),
    ):
        found[f"mlp.shared_experts.{leaf}.weight"] = (outputs, inputs)
        if config.flag("use_bias"):
            found[f"mlp.shared_experts.{leaf}.bias"] = (outputs,)
    return found


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    refuse_flag(parent, "use_bias", "the experts of ERNIE-4.5 have no biases")
    config = parent.completed()
    config.update(
        moe_num_experts=experts,
        moe_k=top_k,
        moe_num_shared_experts=0,
        moe_intermediate_size=parent.integer("intermediate_size"),
        moe_layer_start_index=0,
        moe_layer_end_index=parent.layers - 1,
        moe_layer_interval=1,
        moe_norm_min=1e-12,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    return both_rope_spellings(config)


def _shared_size(config: Mapping[str, object], width: int) -> dict[str, object]:
    """The shared expert is as wide as a whole number of routed ones."""
    return {
        "moe_num_shared_experts": whole_experts(config, "moe_intermediate_size", width, "ERNIE-4.5")
    }


FAMILY = Family(
    model_type="ernie4_5_moe",
    class_name="Ernie4_5_MoeForCausalLM",
    attention=lambda config: flagged_attention(config, flag="use_bias"),
    dense_biases=lambda config: config.flag("use_bias"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    moe=MoE(
        layouts=(per_expert(correction=f"mlp.{CORRECTION}", correction_rank=2), STOCK),
        expert_keys=("moe_num_experts",),
        other_keys=("num_experts",),
        width_key="moe_intermediate_size",
        top_k_keys=("moe_k", "num_experts_per_tok"),
        rule=_rule,
        is_moe_layer=_is_moe_layer,
        shared=_shared,
        stock=STOCK,
    ),
    head_bias=lambda config: config.flag("use_bias"),
    prediction_prefixes=("model.mtp_", "mtp_"),
    target=DenseTarget(
        ("ernie4_5",),
        _from_dense,
        neutral_shared={role: f"mlp.shared_experts.{role}_proj.weight" for role in PROJECTIONS},
        shared_size=_shared_size,
    ),
)
