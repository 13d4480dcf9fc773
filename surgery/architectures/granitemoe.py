"""Granite 3 mixtures: Llama's attention with multipliers, experts stacked in the Hub's own names."""

from ._granite import DEFAULTS, HUB, STOCK, granite_attention, granite_rule, logits_divisor
from .base import DenseTarget, Family, MoE
from .config import Config, both_rope_spellings, refuse_flag


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
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


FAMILY = Family(
    model_type="granitemoe",
    class_name="GraniteMoeForCausalLM",
    attention=granite_attention,
    defaults=DEFAULTS,
    moe=MoE(
        layouts=(HUB, STOCK),
        expert_keys=("num_local_experts",),
        other_keys=("num_experts",),
        width_key="intermediate_size",
        rule=granite_rule,
        stock=STOCK,
    ),
    logits_divisor=logits_divisor,
    target=DenseTarget(("granite",), _from_dense),
)
