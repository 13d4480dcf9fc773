"""Facts that the Qwen MoE families and OLMoE share. Not a family of its own."""

from ..errors import InputError
from .base import RouterRule, Shape, attention_shapes
from .config import Config


def qwen_rule(config: Config) -> RouterRule:
    """Softmax over all experts, top-k, renormalised where ``norm_topk_prob`` says so (default: not)."""
    return RouterRule(
        "softmax",
        config.integer("num_experts_per_tok"),
        renormalise=config.flag("norm_topk_prob"),
        cast_weights=True,
    )


def qwen_moe_layer(config: Config, layer: int) -> bool:
    """Every ``decoder_sparse_step``-th layer holds experts, except those listed in ``mlp_only_layers``."""
    dense = config.get("mlp_only_layers")
    if dense is not None and not isinstance(dense, list):
        raise InputError(f"{config.where}: mlp_only_layers should be a list, is {dense!r}")
    return layer not in (dense or []) and (layer + 1) % config.integer("decoder_sparse_step") == 0


def qkv_attention(config: Config) -> dict[str, Shape]:
    return attention_shapes(config, qkv_bias=config.flag("qkv_bias"))
