"""Facts that OLMo-2 and FlexOlmo share. Not a family of its own."""

from .base import Shape, flagged_attention
from .config import Config


def olmo_attention(config: Config) -> dict[str, Shape]:
    """Norms after attention and feed-forward, none before; query and key norms as wide as the projections."""
    shapes = flagged_attention(config, qk_norm="full")
    del shapes["input_layernorm.weight"]
    shapes["post_feedforward_layernorm.weight"] = (config.hidden,)
    return shapes
