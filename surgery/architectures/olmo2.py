"""OLMo-2: Llama's feed-forward, norms after attention and feed-forward."""

from ._olmo import olmo_attention
from .base import Family

FAMILY = Family(
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    attention=olmo_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "pad_token_id": 1,
        "eos_token_id": 50279,
    },
)
