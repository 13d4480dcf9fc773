"""FlexOlmo: OLMo-2's block (norms after attention and feed-forward, none before), OLMoE's router and experts."""

from ._olmo import olmo_attention
from ._qwen import qwen_rule
from .base import DenseTarget, Family, MoE
from .config import Config, both_rope_spellings
from .layouts import FUSED, PER_EXPERT


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    config = parent.completed()
    config.update(
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        output_router_logits=False,
        router_aux_loss_coef=0.01,
    )
    return both_rope_spellings(config)


FAMILY = Family(
    model_type="flex_olmo",
    class_name="FlexOlmoForCausalLM",
    attention=olmo_attention,
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "norm_topk_prob": False,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_experts",),
        other_keys=("num_local_experts",),
        width_key="intermediate_size",
        rule=qwen_rule,
    ),
    target=DenseTarget(("olmo2",), _from_dense),
)
