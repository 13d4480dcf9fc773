"""ERNIE-4.5, dense: Llama's block with interleaved rotation, and biases everywhere or nowhere."""

from .base import Family, flagged_attention

FAMILY = Family(
    model_type="ernie4_5",
    class_name="Ernie4_5ForCausalLM",
    attention=lambda config: flagged_attention(config, flag="use_bias"),
    dense_biases=lambda config: config.flag("use_bias"),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "use_bias": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
