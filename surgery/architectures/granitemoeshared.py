"""Granite mixtures with one ungated shared feed-forward of ``shared_intermediate_size`` neurons (0: none)."""

from dataclasses import replace

from ._granite import DEFAULTS, MIXTURE, from_dense, logits_divisor
from .base import DenseTarget, Family, Shapes, flagged_attention
from .config import Config

SHARED = {
    "gate_up": "shared_mlp.input_linear.weight",
    "down": "shared_mlp.output_linear.weight",
}


def _shared(config: Config) -> Shapes:
    if config.get("shared_intermediate_size") == 0:
        return {}
    width = config.integer("shared_intermediate_size")
    return {
        SHARED["gate_up"]: (2 * width, config.hidden),
        SHARED["down"]: (config.hidden, width),
    }


def _from_dense(parent: Config, experts: int, top_k: int) -> dict[str, object]:
    return {**from_dense(parent, experts, top_k), "shared_intermediate_size": 0}


FAMILY = Family(
    model_type="granitemoeshared",
    class_name="GraniteMoeSharedForCausalLM",
    attention=flagged_attention,
    defaults={**DEFAULTS, "shared_intermediate_size": 0},
    moe=replace(MIXTURE, shared=_shared),
    logits_divisor=logits_divisor,
    # The residual multiplier is on the sum of both parts, as it is on the dense feed-forward.
    target=DenseTarget(
        ("granite",),
        _from_dense,
        SHARED,
        lambda raw, width: {"shared_intermediate_size": width},
    ),
)
