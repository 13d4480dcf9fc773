"""Mixtral: Mistral's attention, experts ``w1`` (gate), ``w3`` (up), ``w2`` (down), always renormalised."""

from ..errors import InputError
from .base import DenseTarget, Family, MoE, RouterRule, attention_shapes
from .config import Config, both_rope_spellings
from .layouts import FUSED, ExpertLayout


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    for key in ("attention_bias", "mlp_bias"):
        if parent.flag(key):
            raise InputError(
                f"{parent.where}: {key} is set, and Mixtral has no biases",
                hint="try another --target",
            )
    config = parent.completed()
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)
    config.setdefault("sliding_window", None)
    config.update(
        num_local_experts=experts,
        num_experts=experts,
        num_experts_per_tok=top_k,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
        router_jitter_noise=0.0,
    )
    return both_rope_spellings(config)


FAMILY = Family(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    attention=attention_shapes,
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    moe=MoE(
        layouts=(
            ExpertLayout(
                "per-expert",
                "block_sparse_moe.gate.weight",
                {
                    "gate": "block_sparse_moe.experts.{expert}.w1.weight",
                    "up": "block_sparse_moe.experts.{expert}.w3.weight",
                    "down": "block_sparse_moe.experts.{expert}.w2.weight",
                },
            ),
            FUSED,
        ),
        expert_keys=("num_local_experts", "num_experts"),
        width_key="intermediate_size",
        rule=lambda config: RouterRule(
            "softmax", config.integer("num_experts_per_tok"), renormalise=True
        ),
    ),
    target=DenseTarget(("llama", "mistral"), _from_dense),
)
