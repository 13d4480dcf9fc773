"""Mixtures for transformers 4: the same function as the stock blocks, under the names of transformers 5."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.modeling import moesurg_blocks
from tests.oracle.helpers import stock

Checkpoint = Callable[..., Path]


class Mlp(nn.Module):
    """An expert of transformers 4, by the names of Mixtral or of the others."""

    def __init__(self, block: Any, expert: int, names: tuple[str, str, str]) -> None:
        super().__init__()
        gate, up = block.experts.gate_up_proj[expert].chunk(2)
        self.names, self.act_fn = names, block.experts.act_fn
        for name, matrix in zip(names, (gate, up, block.experts.down_proj[expert]), strict=True):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            linear.weight = nn.Parameter(matrix.detach().clone())
            setattr(self, name, linear)


def old_block(block: Any, top_k: int, norm: bool) -> nn.Module:
    """The modules of a mixture as transformers 4 names them, which its forward does not need here."""
    kind = type(block).__name__
    names = ("w1", "w3", "w2") if "Mixtral" in kind else ("gate_proj", "up_proj", "down_proj")
    made: Any = type(kind, (nn.Module,), {})()
    made.top_k, made.norm_topk_prob = top_k, norm
    made.gate = nn.Linear(block.gate.weight.shape[1], block.gate.weight.shape[0], bias=False)
    made.experts = nn.ModuleList(Mlp(block, e, names) for e in range(block.experts.num_experts))
    for extra in ("shared_expert", "shared_expert_gate"):
        if hasattr(block, extra):
            setattr(made, extra, getattr(block, extra))
    found: nn.Module = made
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_blocks_are_the_stock_ones_under_the_same_names(
    family: str, checkpoint: Checkpoint
) -> None:
    source = checkpoint(family)
    model, rule = stock(source), Model.open(source).rule
    block = model.model.layers[1].mlp
    layer, body = nn.Module(), nn.Module()
    name = "block_sparse_moe" if family == "mixtral" else "mlp"
    setattr(layer, name, old_block(block, rule.top_k, getattr(block.gate, "norm_topk_prob", True)))
    body.layers = nn.ModuleList([layer])
    moesurg_blocks.modernise(body)
    new: Any = layer.mlp
    assert new.state_dict().keys() == block.state_dict().keys()
    assert {key.split(".")[0] for key in layer.state_dict()} == {"mlp"}
    new.load_state_dict(block.state_dict())
    states = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, _ = getattr(layer, name)(states)
        wanted = block(states)
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    copied: Any = copy.deepcopy(layer)
    assert getattr(copied, name) is copied.mlp
    assert copied.mlp is not new


def test_mixtures_of_other_families_are_said_to_need_a_newer_version() -> None:
    block, layer, body = type("OtherBlock", (nn.Module,), {})(), nn.Module(), nn.Module()
    block.experts = nn.ModuleList([nn.Linear(2, 2)])
    layer.mlp, body.layers = block, nn.ModuleList([layer])
    with pytest.raises(ImportError, match="transformers 5 or newer for OtherBlock"):
        moesurg_blocks.modernise(body)
