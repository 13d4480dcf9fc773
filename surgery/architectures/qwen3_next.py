"""Qwen3-Next: gated attention every fourth layer and gated delta networks between, Qwen2-MoE's mixture.

What the checkpoint holds for predicting further tokens (``mtp``) stock classes leave aside; it is passed through.
"""

from ..errors import InputError
from ._qwen import qwen_moe_layer, qwen_rule
from .base import Family, MoE, Shape, Shapes
from .config import Config
from .layouts import FUSED, PER_EXPERT
from .qwen2_moe import shared_expert


def _norms(config: Config) -> dict[str, Shape]:
    return {
        "input_layernorm.weight": (config.hidden,),
        "post_attention_layernorm.weight": (config.hidden,),
    }


def _mixer(config: Config, layer: int) -> Shapes:
    return _linear(config) if _is_linear(config, layer) else _attention(config)


def _is_linear(config: Config, layer: int) -> bool:
    """Whether a layer holds a gated delta network instead of attention."""
    types = config.get("layer_types")
    if types is None:
        return (layer + 1) % config.integer("full_attention_interval") != 0
    kinds = ("linear_attention", "full_attention")
    if not isinstance(types, list) or layer >= len(types) or types[layer] not in kinds:
        raise InputError(
            f"{config.where}: layer_types should name {' or '.join(kinds)} for each layer"
        )
    return bool(types[layer] == "linear_attention")


def _attention(config: Config) -> Shapes:
    """The query projection holds a gate of the same width for every head."""
    hidden, width = config.hidden, config.head_dim
    outputs = {
        "q_proj": 2 * config.heads * width,
        "k_proj": config.kv_heads * width,
        "v_proj": config.kv_heads * width,
    }
    shapes: dict[str, Shape] = {
        f"self_attn.{leaf}.weight": (size, hidden) for leaf, size in outputs.items()
    }
    shapes["self_attn.o_proj.weight"] = (hidden, config.heads * width)
    if config.flag("attention_bias"):
        for leaf, size in outputs.items():
            shapes[f"self_attn.{leaf}.bias"] = (size,)
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (width,)
    return shapes


def _linear(config: Config) -> Shapes:
    hidden, heads = config.hidden, config.integer("linear_num_value_heads")
    keys = config.integer("linear_num_key_heads") * config.integer("linear_key_head_dim")
    width = config.integer("linear_value_head_dim")
    values = heads * width
    return {
        "linear_attn.dt_bias": (heads,),
        "linear_attn.A_log": (heads,),
        "linear_attn.conv1d.weight": (
            2 * keys + values,
            1,
            config.integer("linear_conv_kernel_dim"),
        ),
        "linear_attn.in_proj_qkvz.weight": (2 * keys + 2 * values, hidden),
        "linear_attn.in_proj_ba.weight": (2 * heads, hidden),
        "linear_attn.norm.weight": (width,),
        "linear_attn.out_proj.weight": (hidden, values),
    }


FAMILY = Family(
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
    attention=_norms,
    mixer=_mixer,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "attention_bias": False,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts_per_tok": 10,
        "num_experts": 512,
        "norm_topk_prob": True,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_experts",),
        other_keys=("num_local_experts",),
        width_key="moe_intermediate_size",
        rule=qwen_rule,
        is_moe_layer=qwen_moe_layer,
        shared=shared_expert,
    ),
    prediction_prefixes=("mtp.",),
)
