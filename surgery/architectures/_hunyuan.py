"""Facts that the HunYuan families share. Not a family of its own."""

from .base import Shape, flagged_attention
from .config import Config


def hunyuan_attention(config: Config) -> dict[str, Shape]:
    """Norms of query and key heads, applied after the rotation."""
    shapes = flagged_attention(config)
    shapes["self_attn.query_layernorm.weight"] = (config.head_dim,)
    shapes["self_attn.key_layernorm.weight"] = (config.head_dim,)
    return shapes
