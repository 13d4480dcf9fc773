"""HunYuan 1, dense: Llama's block with head norms after the rotation."""

from ._hunyuan import hunyuan_attention
from .base import Family

FAMILY = Family(
    model_type="hunyuan_v1_dense",
    class_name="HunYuanDenseV1ForCausalLM",
    attention=hunyuan_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
