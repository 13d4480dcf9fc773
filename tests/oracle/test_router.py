"""Our reading of each family's router against the stock router module, exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.architectures.routing import route

CASES = [
    ("mixtral", {}),
    *(
        (family, {"norm_topk_prob": n})
        for family in ("qwen2_moe", "qwen3_moe", "olmoe")
        for n in (True, False)
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "overrides"), CASES)
def test_indices_and_weights_are_those_of_the_stock_router(
    family: str, overrides: dict[str, Any], dtype: torch.dtype, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family, **overrides)
    rule = Model.open(folder).rule
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(500, stock.config.hidden_size, generator=generator).to(dtype)
    for layer in stock.model.layers:
        with torch.no_grad():
            logits_TE, weights_TK, index_TK = layer.mlp.gate(hidden_TD)
        ours_TK, chosen_TK = route(logits_TE, rule)
        torch.testing.assert_close(chosen_TK, index_TK, atol=0, rtol=0)
        torch.testing.assert_close(ours_TK, weights_TK, atol=0, rtol=0)
        assert rule.weights_sum_to_one == bool(overrides.get("norm_topk_prob", True))
