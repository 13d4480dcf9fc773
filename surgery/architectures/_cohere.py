"""Facts that the Cohere 2 families share. Not a family of its own."""

from ..errors import InputError
from .base import Shape, flagged_attention
from .config import Config

DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
}


def cohere_attention(config: Config) -> dict[str, Shape]:
    """One norm for attention and feed-forward, which run side by side."""
    shapes = flagged_attention(config)
    del shapes["post_attention_layernorm.weight"]
    return shapes


def logits_divisor(config: Config) -> float:
    """Stock multiplies the head's outputs by ``logit_scale``."""
    scale = config.number("logit_scale", 0.0625)
    if scale == 0:
        raise InputError(f"{config.where}: logit_scale is 0, which makes every logit 0")
    return 1 / scale
