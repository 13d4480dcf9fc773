"""Llama 4, text only: a router whose sigmoid scales what an expert is given, one ungated shared expert.

An expert's part of the output is f(g x), not g f(x). Experts are stored transposed, gate columns before up columns.
Some layers may be dense; those that are stand in ``moe_layers`` or follow from ``interleave_moe_layer_step``.
"""

from __future__ import annotations

from ..errors import InputError
from .base import Family, MoE, RouterRule, Shapes, flagged_attention
from .config import Config
from .layouts import ExpertLayout

STOCK = ExpertLayout(
    "fused",
    "feed_forward.router.weight",
    {"gate_up": "feed_forward.experts.gate_up_proj", "down": "feed_forward.experts.down_proj"},
    transposed=True,
    call="scaled",
)


def _is_moe_layer(config: Config, layer: int) -> bool:
    listed = config.get("moe_layers")
    if listed is None:
        return (layer + 1) % config.integer("interleave_moe_layer_step") == 0
    if not isinstance(listed, list):
        raise InputError(f"{config.where}: moe_layers should be a list, is {listed!r}")
    return layer in listed


def _shared(config: Config) -> Shapes:
    width, hidden = config.integer("intermediate_size"), config.hidden
    return {
        "feed_forward.shared_expert.gate_proj.weight": (width, hidden),
        "feed_forward.shared_expert.up_proj.weight": (width, hidden),
        "feed_forward.shared_expert.down_proj.weight": (hidden, width),
    }


FAMILY = Family(
    model_type="llama4_text",
    class_name="Llama4ForCausalLM",
    attention=flagged_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size_mlp": 16384,
        "num_experts_per_tok": 1,
        "num_local_experts": 16,
        "interleave_moe_layer_step": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    moe=MoE(
        layouts=(STOCK,),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=lambda config: RouterRule(
            "selected-sigmoid",
            config.integer("num_experts_per_tok"),
            renormalise=False,
            cast_weights=True,
            scales_input=True,
        ),
        is_moe_layer=_is_moe_layer,
        shared=_shared,
        stock=STOCK,
    ),
    dense_ffn={
        "gate": "feed_forward.gate_proj.weight",
        "up": "feed_forward.up_proj.weight",
        "down": "feed_forward.down_proj.weight",
    },
    dense_width_key="intermediate_size_mlp",
)
