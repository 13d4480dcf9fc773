"""Families whose blocks call their experts in ways of their own, JetMoE and Llama 4, against stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.architectures.routing import route
from moesurg.surgery.calibration.collect import collect
from moesurg.surgery.calibration.forward import LayerStream
from moesurg.surgery.calibration.stock import replace_experts
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError
from moesurg.surgery.inspection import inspect
from moesurg.surgery.methods._mixture import recounted
from tests.oracle.helpers import drift, operate, stock, tensors
from tests.oracle.test_families import CALLS
from tests.oracle.test_forward import compare, sequences

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("family", CALLS)
def test_the_streamed_forward_is_stocks(family: str, checkpoint: Checkpoint) -> None:
    compare(checkpoint(family))


@pytest.mark.parametrize("top_k", [1, 2])
def test_layers_of_llama_follow_from_a_step(top_k: int, checkpoint: Checkpoint) -> None:
    """With dense layers between, and several experts a token."""
    folder = checkpoint(
        "llama4_text",
        moe_layers=None,
        interleave_moe_layer_step=2,
        num_experts_per_tok=top_k,
        num_hidden_layers=4,
        no_rope_layers=None,
    )
    assert [layer.index for layer in Model.open(folder).moe_layers] == [1, 3]
    compare(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CALLS)
def test_the_router_is_the_stock_router(
    family: str, dtype: torch.dtype, checkpoint: Checkpoint
) -> None:
    folder = checkpoint(family)
    model = Model.open(folder)
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    hidden_TD = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for layer in model.moe_layers:
        module = full.model.layers[layer.index]
        with torch.no_grad():
            if family == "jetmoe":
                router = module.mlp.router
                sorted_index_N, _, gate_N, sizes, logits_TE = router(hidden_TD)
                # Stock lists (token, slot) pairs by expert; put the gates back in their places.
                wanted_N = torch.empty_like(gate_N)
                wanted_N[sorted_index_N] = gate_N
                expert_N = torch.repeat_interleave(torch.arange(8), torch.tensor(sizes))
                chosen_N = torch.empty_like(expert_N)
                chosen_N[sorted_index_N] = expert_N
                wanted_TK, index_TK = wanted_N.view(500, -1), chosen_N.view(500, -1)
            else:
                scores_TE, logits_TE = module.feed_forward.router(hidden_TD)
                wanted_TK, index_TK = scores_TE.max(dim=1, keepdim=True)
        weight_TK, found_TK = route(logits_TE, model.rule, None, dtype)
        torch.testing.assert_close(found_TK, index_TK, atol=0, rtol=0)
        torch.testing.assert_close(weight_TK, wanted_TK, atol=0, rtol=0)


@pytest.mark.parametrize("family", CALLS)
def test_collecting_changes_nothing_and_sees_what_stock_computes(
    family: str, checkpoint: Checkpoint
) -> None:
    """Parts of the output of every expert, from the stock modules alone: one expert at a time is left in."""
    folder = checkpoint(family)
    model, text = Model.open(folder), sequences()
    with TensorReader(model.checkpoint) as reader:
        found = collect(model, reader, text, mode="all").tensors
    layer = model.moe_layers[-1]
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    block: Any = full.model.layers[layer.index].get_submodule(
        "mlp" if family == "jetmoe" else "feed_forward"
    )
    seen: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for ids in text.ids:
            full(torch.as_tensor(ids)[None], use_cache=False)
        input_TD = torch.cat(seen)
        router = block.router.layer if family == "jetmoe" else block.router
        logits_TE = input_TD @ router.weight.T
        weight_TK, index_TK = route(logits_TE, model.rule)
        weight_TE = torch.zeros_like(logits_TE).scatter_(1, index_TK, weight_TK)
        norm_E, all_ED = torch.zeros(8), torch.zeros(8, 32)
        for expert in range(8):
            share_T1 = weight_TE[:, expert, None]
            on = share_T1[:, 0] > 0
            if family == "jetmoe":
                gate_up, down = (
                    block.input_linear.weight[expert],
                    block.output_linear.weight[expert],
                )
                both = (input_TD @ gate_up.T).chunk(2, -1)
                output_TD = (torch.nn.functional.silu(both[0]) * both[1]) @ down.T
                routed_TD, every_TD = output_TD, output_TD
            else:
                scale_T1 = logits_TE[:, expert, None].sigmoid()
                given = torch.zeros(8, len(input_TD), 32)
                given[expert] = input_TD * scale_T1
                every_TD = block.experts(given.reshape(-1, 32)).view(8, -1, 32)[expert] / scale_T1
                routed_TD = every_TD
            norm_E[expert] = routed_TD[on].norm(dim=-1).sum()
            all_ED[expert] = every_TD.sum(0)
    prefix = f"layers.{layer.index}.{text.domains[0]}."
    for name, wanted in (
        ("count_E", (weight_TE > 0).sum(0).float()),
        ("gate_E", weight_TE.sum(0)),
        ("norm_E", norm_E),
        ("output_ED", all_ED),
    ):
        torch.testing.assert_close(
            torch.from_numpy(found[prefix + name]).float(), wanted, atol=2e-3, rtol=1e-3
        )


@pytest.mark.parametrize("family", CALLS)
def test_collecting_gives_the_layers_the_same_states(family: str, checkpoint: Checkpoint) -> None:
    """Statistics of the last layer depend on all layers before it, which run through recast blocks."""
    folder = checkpoint(family)
    model, text = Model.open(folder), sequences()
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = "mlp" if family == "jetmoe" else "feed_forward"
    last = model.moe_layers[-1].index
    seen: list[torch.Tensor] = []
    full.model.layers[last].get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, 32))
    )
    with torch.no_grad():
        for ids in text.ids:
            full(torch.as_tensor(ids)[None], use_cache=False)
    with TensorReader(model.checkpoint) as reader:
        found = collect(model, reader, text, mode="routed", inputs=text.total).tensors
    rows = torch.from_numpy(found[f"inputs.{last}"])
    # Sequences are batched by length, so rows come in another order; each has its own nearest one.
    distance, nearest = torch.cdist(rows.double(), torch.cat(seen).double()).min(dim=1)
    assert float(distance.max()) < 1e-4
    assert len(nearest.unique()) == len(rows)


def test_jetmoe_keeps_its_number_of_experts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """In a stock checkpoint, which a tied merge therefore is; fewer need model code (test_forms.py)."""
    source = checkpoint("jetmoe")
    with pytest.raises(InputError, match="experts of attention"):
        recounted(Model.open(source), 4)
    operate("merge", "m-smoe", source, tmp_path / "tied", experts=4, router="tied", tokens=128)
    stock(tmp_path / "tied")
    attention = {name: value for name, value in tensors(source).items() if "attention" in name}
    after = tensors(tmp_path / "tied")
    assert all(torch.equal(after[name], value) for name, value in attention.items())
    assert drift(source, tmp_path / "tied") > 1e-3


@pytest.mark.parametrize(
    ("command", "method", "options"),
    [
        ("prune", "naee", {"experts": 6}),
        ("merge", "mergemoe", {"experts": 4}),
        ("merge", "m-smoe", {"experts": 4, "reconstruct": True}),
    ],
)
def test_what_recomputes_mixtures_refuses_scaled_inputs(
    command: str, method: str, options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="multiplies what its experts are given"):
        operate(
            command, method, checkpoint("llama4_text"), tmp_path / "out", dry_run=True, **options
        )


def test_inspection_knows_that_attention_is_routed_too(checkpoint: Checkpoint) -> None:
    found: Any = inspect(str(checkpoint("jetmoe")))
    model = AutoModelForCausalLM.from_pretrained(checkpoint("jetmoe"))
    held = sum(parameter.numel() for parameter in model.parameters())
    assert found["parameters"]["total"] == held
    routed = sum(
        parameter.numel() for name, parameter in model.named_parameters() if "_linear" in name
    )
    assert held - found["parameters"]["active_per_token"] == routed * 6 // 8
    assert sum(row["parameters"] - row["active"] for row in found["per_layer"]) == routed * 6 // 8


def test_experts_of_jetmoe_can_be_replaced(checkpoint: Checkpoint) -> None:
    """By half of them: what stock computes then is what it does with the others' logits at minus infinity."""
    model = Model.open(checkpoint("jetmoe"))
    with (
        TensorReader(model.checkpoint) as reader,
        LayerStream(model, reader).run(sequences()) as run,
    ):
        step = next(run.layers())
        block: Any = step.module.get_submodule("mlp")
        kept = [0, 2, 5, 7]
        weights = [
            value[kept].clone()
            for value in (
                block.router.layer.weight,
                block.input_linear.weight,
                block.output_linear.weight,
            )
        ]
        dropped = torch.tensor([expert not in kept for expert in range(8)])
        hook = block.router.layer.register_forward_hook(
            lambda _, args, output: output.masked_fill(dropped, float("-inf"))
        )
        before = step.forward(run.batches[0])
        hook.remove()
        facts = step.layer.experts
        assert facts is not None
        replace_experts(step.module, *weights, stock=facts.stock)
        torch.testing.assert_close(step.forward(run.batches[0]), before, atol=2e-5, rtol=1e-5)
