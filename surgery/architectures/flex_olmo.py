"""FlexOlmo: OLMo-2's block (norms after attention and feed-forward, none before), OLMoE's router and experts."""

from ._qwen import qwen_rule
from .base import Family, MoE, Shape, attention_shapes
from .config import Config
from .layouts import FUSED, PER_EXPERT


def _attention(config: Config) -> dict[str, Shape]:
    biased = config.flag("attention_bias")
    shapes = attention_shapes(config, qkv_bias=biased, output_bias=biased, qk_norm="full")
    del shapes["input_layernorm.weight"]
    shapes["post_feedforward_layernorm.weight"] = (config.hidden,)
    return shapes


FAMILY = Family(
    model_type="flex_olmo",
    class_name="FlexOlmoForCausalLM",
    attention=_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "norm_topk_prob": False,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_experts",),
        other_keys=("num_local_experts",),
        width_key="intermediate_size",
        rule=qwen_rule,
    ),
)
