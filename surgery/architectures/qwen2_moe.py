"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside one shared expert behind a sigmoid gate."""

from ..errors import InputError
from ._qwen import qkv_attention, qwen_moe_layer, qwen_rule
from .base import DenseTarget, Family, MoE, Shapes
from .config import Config, both_rope_spellings
from .layouts import FUSED, PER_EXPERT
from .qwen2 import QWEN_DEFAULTS

NEUTRAL_WIDTH = 64
"""Most neurons of the shared expert that upcycling adds: the family requires one; 64 keeps kernels aligned."""


SHARED = {
    "gate": "mlp.shared_expert.gate_proj.weight",
    "up": "mlp.shared_expert.up_proj.weight",
    "down": "mlp.shared_expert.down_proj.weight",
    "switch": "mlp.shared_expert_gate.weight",
}


def shared_expert(config: Config) -> Shapes:
    """The expert every token passes, and the gate in front of it."""
    hidden, width = config.hidden, config.integer("shared_expert_intermediate_size")
    return {
        SHARED["gate"]: (width, hidden),
        SHARED["up"]: (width, hidden),
        SHARED["down"]: (hidden, width),
        SHARED["switch"]: (1, hidden),
    }


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    for key in ("attention_bias", "mlp_bias"):
        if parent.flag(key):
            raise InputError(
                f"{parent.where}: {key} is set, and Qwen2-MoE has no such biases",
                hint="it has biases on query, key and value only",
            )
    config = parent.completed()
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)
    qwen2 = parent.raw.get("model_type") == "qwen2"
    if not qwen2:
        # Mistral slides every layer where it has a window, Llama none.
        slides = parent.get("sliding_window") is not None
        config["use_sliding_window"] = slides
        if slides:
            config["layer_types"] = ["sliding_attention"] * parent.layers
    if parent.flag("use_sliding_window") and parent.get("layer_types") is None:
        # Qwen2 slides the layers from max_window_layers on; Qwen2-MoE derives another pattern from the same
        # keys, so the parent's pattern is written out.
        first = parent.integer("max_window_layers")
        config["layer_types"] = [
            "sliding_attention" if layer >= first else "full_attention"
            for layer in range(parent.layers)
        ]
    config.update(
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=parent.integer("intermediate_size"),
        shared_expert_intermediate_size=min(NEUTRAL_WIDTH, parent.integer("intermediate_size")),
        norm_topk_prob=True,
        qkv_bias=qwen2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )
    return both_rope_spellings(config)


FAMILY = Family(
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    attention=qkv_attention,
    defaults={
        **QWEN_DEFAULTS,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "qkv_bias": True,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    moe=MoE(
        layouts=(PER_EXPERT, FUSED),
        expert_keys=("num_experts",),
        width_key="moe_intermediate_size",
        rule=qwen_rule,
        is_moe_layer=qwen_moe_layer,
        shared=shared_expert,
    ),
    target=DenseTarget(
        ("qwen2", "llama", "mistral"),
        _from_dense,
        neutral_shared=SHARED,
        shared_size=lambda config, width: {"shared_expert_intermediate_size": width},
    ),
)
