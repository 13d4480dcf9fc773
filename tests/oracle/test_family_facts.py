"""What the facts on mixtures say of full-size models, against stock classes without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moesurg.surgery.architectures import families
from moesurg.surgery.architectures.model import Model
from moesurg.surgery.checkpoint.header import TensorInfo
from moesurg.surgery.checkpoint.reader import Checkpoint
from tests.oracle.test_families import CALLS, FAMILIES

REQUIRED: dict[str, dict[str, int]] = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_moe": {"head_dim": 128},
}
"""What stock has no usable default for."""
DERIVED = {"moe_layer_end_index": -1, "full_attention_interval": 4}
"""Defaults that stock replaces by what follows from them."""


def stock_config(family: str, **changes: Any) -> Any:
    return transformers.CONFIG_MAPPING[family](**REQUIRED.get(family, {}), **changes)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *CALLS, "cohere2", "granite", "olmo2", "ernie4_5", "hunyuan_v1_dense"]
)
def test_defaults_are_those_of_stock(family: str) -> None:
    config = stock_config(family)
    rope = dict(config.rope_parameters)
    for key, value in families()[family].defaults.items():
        if key in DERIVED:
            assert value == DERIVED[key]
        elif key in ("rope_theta", "partial_rotary_factor"):
            assert value == rope[key]
        else:
            assert value == getattr(config, key), key


@pytest.mark.parametrize("family", [*FAMILIES, *CALLS])
def test_shapes_are_those_of_the_full_size(family: str) -> None:
    """Every tensor of a four-layer model of the family's own sizes, with what the defaults fill in left out."""
    facts = families()[family]
    config = stock_config(family, num_hidden_layers=4)
    model_class: Any = getattr(transformers, facts.class_name)
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape) for name, value in model_class(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    raw = {
        key: value
        for key, value in config.to_dict().items()
        if key not in facts.defaults and (value is not None or key == "q_lora_rank")
    }
    nowhere = Path("nowhere")
    stored = {
        name: TensorInfo(name, "BF16", shape, nowhere, 0, 0) for name, shape in shapes.items()
    }
    model = Model(Checkpoint(nowhere, raw, stored, ()))
    assert set(model.names()) == set(shapes)
    assert model.layout == facts.moe.stock if facts.moe else False
    mixtures = [layer.index for layer in model.layers if layer.experts is not None]
    experts = facts.moe.stock.names["down"] if facts.moe else ""
    assert mixtures == [
        index for index in range(4) if facts.prefix.format(layer=index) + experts in shapes
    ]
