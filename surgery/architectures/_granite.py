"""Facts that the Granite families share. Not a family of its own."""

from .base import MoE, selected_softmax
from .config import Config, both_rope_spellings, refuse_flag
from .layouts import ExpertLayout, fused

HUB = ExpertLayout(
    "fused",
    "block_sparse_moe.router.layer.weight",
    {
        "gate_up": "block_sparse_moe.input_linear.weight",
        "down": "block_sparse_moe.output_linear.weight",
    },
)
STOCK = fused("block_sparse_moe.router.weight", "block_sparse_moe.experts")

DENSE_DEFAULTS: dict[str, object] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
DEFAULTS: dict[str, object] = {
    **DENSE_DEFAULTS,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MIXTURE = MoE(
    layouts=(HUB, STOCK),
    expert_keys=("num_local_experts",),
    other_keys=("num_experts",),
    width_key="intermediate_size",
    rule=selected_softmax,
    stock=STOCK,
)


def logits_divisor(config: Config) -> float:
    return config.number("logits_scaling", 1.0)


def from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    """The config of a mixture with a dense Granite's blocks, whose multipliers stay as they are."""
    config = parent.completed()
    refuse_flag(parent, "mlp_bias", "GraniteMoE has no biases in its experts")
    config.pop("mlp_bias", None)
    config.update(
        num_local_experts=experts,
        num_experts=experts,
        num_experts_per_tok=top_k,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    return both_rope_spellings(config)
