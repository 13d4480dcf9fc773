"""Qwen3-MoE: Qwen3's attention, no shared expert; renormalised in every released model, not by default."""

from ..errors import InputError
from ._qwen import qwen_moe_layer, qwen_rule
from .base import DenseTarget, Family, MoE, flagged_attention
from .config import Config, both_rope_spellings
from .layouts import FUSED, PER_EXPERT
from .qwen2 import QWEN_DEFAULTS


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    config = parent.completed()
    types = config.pop("layer_types", None)
    if parent.flag("use_sliding_window"):
        # Qwen3-MoE has one window for all layers, dense Qwen3 only from max_window_layers on.
        full = isinstance(types, list) and "full_attention" in types
        if full or (types is None and config.get("max_window_layers") != 0):
            raise InputError(
                f"{parent.where}: mixes full and sliding attention layers, which Qwen3-MoE cannot"
            )
    config.update(
        num_experts=experts,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=parent.integer("intermediate_size"),
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    return both_rope_spellings(config)


FAMILY = Family(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    attention=lambda config: flagged_attention(config, qk_norm="head"),
    defaults={
        **QWEN_DEFAULTS,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_local_experts", "num_experts"),
        width_key="moe_intermediate_size",
        rule=qwen_rule,
        is_moe_layer=qwen_moe_layer,
    ),
    target=DenseTarget(("qwen3",), _from_dense),
)
