"""Facts that the HunYuan families share. Not a family of its own."""

from .base import Shape, attention_shapes
from .config import Config


def hunyuan_attention(config: Config) -> dict[str, Shape]:
    """Norms of query and key heads, applied after the rotation."""
    biased = config.flag("attention_bias")
    shapes = attention_shapes(config, qkv_bias=biased, output_bias=biased)
    shapes["self_attn.query_layernorm.weight"] = (config.head_dim,)
    shapes["self_attn.key_layernorm.weight"] = (config.head_dim,)
    return shapes
