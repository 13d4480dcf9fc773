"""Every further family of mixtures against stock transformers: names, forward, router, statistics, merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.architectures.routing import route
from moesurg.surgery.calibration.collect import collect
from moesurg.surgery.calibration.forward import LayerStream
from moesurg.surgery.calibration.stock import replace_experts
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.errors import InputError, MoesurgError
from moesurg.surgery.inspection import inspect
from tests.oracle.helpers import operate, rewrite, stock, tensors, token_ids
from tests.oracle.test_forward import compare, sequences

Checkpoint = Callable[..., Path]
FAMILIES = [
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "flex_olmo",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "minimax_m2",
    "phimoe",
    "qwen3_next",
]
CALLS = ["jetmoe", "llama4_text"]
"""Families whose blocks call their experts in ways of their own; the rest of their tests is in test_calls.py."""
BOTH = [family for family in FAMILIES if family != "gpt_oss"]
"""Stock writes and reads these in two layouts."""
GROUPED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": {"n_group": 4, "topk_group": 2},
    "glm4_moe": {"n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    "dots1": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 0.7},
}
CASES = [
    *((family, {}, dtype) for family in FAMILIES for dtype in (torch.float32, torch.bfloat16)),
    *((family, overrides, torch.float32) for family, overrides in GROUPED.items()),
]


@pytest.mark.parametrize("family", BOTH)
def test_the_fused_layout_runs_as_stock(family: str, checkpoint: Checkpoint) -> None:
    """The Hub's layout is tested with all other families."""
    compare(checkpoint(family, layout="fused"))


@pytest.mark.parametrize("family", sorted(GROUPED))
def test_group_limited_routing_runs_as_stock(family: str, checkpoint: Checkpoint) -> None:
    compare(checkpoint(family, **GROUPED[family]))


@pytest.mark.parametrize(("family", "overrides", "dtype"), CASES)
def test_the_router_is_the_stock_router(
    family: str, overrides: dict[str, Any], dtype: torch.dtype, checkpoint: Checkpoint
) -> None:
    """Same experts, same weights to the last bit; without the selection bias, other experts."""
    folder = checkpoint(family, **overrides)
    model = Model.open(folder)
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(500, model.config.hidden, generator=generator).to(dtype)
    for layer in model.moe_layers:
        assert layer.experts is not None
        names = layer.experts.stock
        place = names.modules[0].removesuffix(
            ".wg"
        )  # HunYuan's router is a module around the weight
        module = full.model.layers[layer.index].get_submodule(place)
        correction_E = None
        arguments: list[torch.Tensor] = []
        if names.correction:
            place, _, leaf = names.correction.rpartition(".")
            owner = full.model.layers[layer.index].get_submodule(place)
            correction_E = getattr(owner, leaf).detach().flatten()
            assert float(correction_E.abs().min()) > 0
            if place != names.modules[0] and not place.startswith(names.modules[0]):
                arguments.append(getattr(owner, leaf))
        with torch.no_grad():
            logits_TE, weights_TK, index_TK = module(hidden_TD, *arguments)
        ours_TK, chosen_TK = route(logits_TE, model.rule, correction_E, dtype)
        torch.testing.assert_close(chosen_TK, index_TK, atol=0, rtol=0)
        torch.testing.assert_close(ours_TK, weights_TK, atol=0, rtol=0)
        if correction_E is not None:
            assert not torch.equal(route(logits_TE, model.rule)[1], index_TK)
        if model.rule.weights_sum_to_one:
            ones_T = torch.ones(len(weights_TK))
            torch.testing.assert_close(
                weights_TK.float().sum(-1),
                ones_T,
                atol=1e-2 if dtype == torch.bfloat16 else 1e-6,
                rtol=0,
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_stock_experts(family: str, checkpoint: Checkpoint) -> None:
    """Counts and output norms of all experts on all tokens, computed with stock modules alone."""
    folder = checkpoint(family)
    model, text = Model.open(folder), sequences()
    with TensorReader(model.checkpoint) as reader:
        found = collect(model, reader, text, mode="all").tensors
    layer = model.moe_layers[-1]
    assert layer.experts is not None
    experts = layer.experts.stock.modules[1]
    full: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    full.set_experts_implementation("eager")
    module = full.model.layers[layer.index]
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    stock_experts = module.get_submodule(experts)
    stock_experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    count_E = torch.zeros(model.experts, dtype=torch.float64)
    gate_E, output_ED = count_E.clone(), torch.zeros(model.experts, model.config.hidden)
    with torch.no_grad():
        for ids in text.ids:
            full(torch.as_tensor(ids)[None], use_cache=False)
            input_TD, index_TK, weight_TK = seen.pop()
            count_E += torch.bincount(index_TK.flatten(), minlength=model.experts)
            gate_E += torch.bincount(
                index_TK.flatten(), weight_TK.double().flatten(), model.experts
            )
            for expert in range(model.experts):
                index_T1 = torch.full((len(input_TD), 1), expert)
                ones_T1 = torch.ones(len(input_TD), 1)
                output_ED[expert] += stock_experts(input_TD, index_T1, ones_T1).sum(0)
                seen.clear()
    prefix = f"layers.{layer.index}.{text.domains[0]}."
    assert torch.equal(torch.from_numpy(found[prefix + "count_E"]), count_E)
    torch.testing.assert_close(
        torch.from_numpy(found[prefix + "gate_E"]), gate_E, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.from_numpy(found[prefix + "output_ED"]).float(), output_ED, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("family", [*FAMILIES, *CALLS])
def test_merging_nothing_gives_the_same_bytes(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    layouts: list[dict[str, str]] = [{}, {"layout": "fused"}] if family in BOTH else [{}]
    for number, layout in enumerate(layouts):
        source, output = checkpoint(family, **layout), tmp_path / str(number)
        result = operate("merge", "m-smoe", source, output, experts=8, tokens=128)
        assert result["exactness"]["kind"] == "bitwise"
        before, after = tensors(source), tensors(output)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.dtype == after[key].dtype
            assert torch.equal(value, after[key])


@pytest.mark.parametrize("method", ["m-smoe", "sub-moe"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_merged_models_load_and_generate(
    family: str, method: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    router = {"m-smoe": "keep", "sub-moe": "mean"}[method]
    operate("merge", method, source, tmp_path / "out", experts=4, router=router, tokens=128)
    merged = Model.open(tmp_path / "out")
    assert merged.experts == 4
    generated = stock(tmp_path / "out").generate(
        token_ids(source, rows=1), min_new_tokens=2, max_new_tokens=2, do_sample=False
    )
    assert generated.shape[1] == 26
    check_routing(Model.open(source), merged, router, tmp_path / "out")


def check_routing(source: Model, merged: Model, router: str, folder: Path) -> None:
    """Rows of weight, bias and selection bias: the representative's, or the mean of the group's."""
    decisions = json.loads((folder / "report.json").read_text())["decisions"]
    with TensorReader(source.checkpoint) as before, TensorReader(merged.checkpoint) as after:
        for old, new in zip(source.moe_layers, merged.moe_layers, strict=True):
            assert old.experts is not None
            assert new.experts is not None
            decided = decisions[str(old.index)]
            for first, second in zip(old.experts.routing, new.experts.routing, strict=True):
                rows, found = before.read(first), after.read(second)
                for slot, group in enumerate(decided["groups"]):
                    expected = rows[decided["representatives"][slot]]
                    if router == "mean":
                        share = torch.tensor(decided["weights"][slot], dtype=torch.float64)
                        expected = (share @ rows[group].double()).to(rows.dtype)
                    assert torch.equal(found[slot], expected)


@pytest.mark.parametrize("family", [*FAMILIES, "llama4_text"])
def test_inspection_counts_what_stock_holds(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    found: Any = inspect(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = sum(p.numel() for name, p in model.named_parameters() if "correction_bias" not in name)
    assert found["parameters"]["total"] == held
    components = found["parameters"]["components"]
    saved = found["parameters"]["total"] - found["parameters"]["active_per_token"]
    assert saved == components["experts"] * (8 - model.config.num_experts_per_tok) // 8
    assert sum(row["parameters"] - row["active"] for row in found["per_layer"]) == saved
    assert sum(row["kind"] == "moe" for row in found["per_layer"]) == found["moe"]["layers"]


@pytest.mark.parametrize("family", sorted(GROUPED))
def test_groups_are_kept_or_merging_is_refused(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family, **GROUPED[family])
    with pytest.raises(InputError, match="groups"):
        operate("merge", "m-smoe", source, tmp_path / "out", experts=4, dry_run=True)
    operate("merge", "m-smoe", source, tmp_path / "out", experts=4, router="tied", tokens=128)
    stock(tmp_path / "out")


def test_layers_that_predict_further_tokens_are_passed_through(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("glm4_moe")
    extra = {"model.layers.3.eh_proj.weight": torch.ones(32, 64)}
    folder = rewrite(source, tmp_path / "with", extra)
    result = operate("merge", "m-smoe", folder, tmp_path / "out", experts=4, tokens=128)
    assert any("predict further tokens" in note for note in result["notes"])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(next(iter(extra))), next(iter(extra.values())))
    other = rewrite(source, tmp_path / "other", {"model.layers.4.eh_proj.weight": torch.ones(2)})
    with pytest.raises(InputError, match="is not part of"):
        Model.open(other)


def test_the_selection_bias_keeps_its_type(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A float32 bias beside bfloat16 weights, as published checkpoints store it."""
    source = checkpoint("glm4_moe", dtype="bfloat16")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folder = rewrite(source, tmp_path / "mixed", {name: torch.linspace(-0.1, 0.1, 8)})
    operate("merge", "m-smoe", folder, tmp_path / "out", experts=4, tokens=128)
    after = tensors(tmp_path / "out")
    assert after[name].dtype == torch.float32
    assert after["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.bfloat16
    assert set(after[name].tolist()) < set(tensors(folder)[name].tolist())


def test_neurons_with_biases_are_aligned(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Copies of one gpt-oss expert with shuffled neurons merge to the original, strided writes and all."""
    source = checkpoint("gpt_oss")
    stored, change = tensors(source), {}
    generator = torch.Generator().manual_seed(3)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            change[prefix + leaf] = stored[prefix + leaf].clone()
        for expert in range(8):
            order = torch.randperm(24, generator=generator) if expert else torch.arange(24)
            columns = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
            for leaf, axis, place in (
                ("gate_up_proj", 1, columns),
                ("gate_up_proj_bias", 0, columns),
                ("down_proj", 0, order),
            ):
                moved = stored[prefix + leaf][0].index_select(axis, place)
                change[prefix + leaf][expert] = moved
            change[prefix + "down_proj_bias"][expert] = stored[prefix + "down_proj_bias"][0]
    folder = rewrite(source, tmp_path / "copies", change)
    operate("merge", "m-smoe", folder, tmp_path / "out", experts=2, tokens=128)
    merged = tensors(tmp_path / "out")
    for layer in range(3):
        for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            name = f"model.layers.{layer}.mlp.experts.{leaf}"
            for expert in merged[name]:
                torch.testing.assert_close(expert, stored[name][0], atol=1e-6, rtol=1e-6)


def test_experts_of_a_layer_can_be_replaced(checkpoint: Checkpoint) -> None:
    """All of them in another order change nothing, bias and all."""
    model = Model.open(checkpoint("deepseek_v3"))
    with (
        TensorReader(model.checkpoint) as reader,
        LayerStream(model, reader).run(sequences()) as run,
    ):
        step = next(step for step in run.layers() if step.layer.experts is not None)
        assert step.layer.experts is not None
        names = step.layer.experts.stock
        block: Any = step.module.get_submodule("mlp")
        order = [3, 1, 0, 2, 7, 6, 5, 4]
        weights = [
            value[order].clone()
            for value in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
        ]
        bias_E = block.gate.e_score_correction_bias[order].clone()
        before = step.forward(run.batches[0])
        with pytest.raises(MoesurgError, match="not all the parameters"):
            replace_experts(step.module, *weights, stock=names)
        replace_experts(step.module, *weights, stock=names, correction_E=bias_E)
        after = step.forward(run.batches[0])
        torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "problem"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, "ignores in DeepSeek-V2"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 5}, "impossible"),
        ("deepseek_v3", {"n_group": 8, "topk_group": 8}, "impossible"),
        ("deepseek_v3", {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "hold fewer"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 2, 3]}, "different numbers of experts"),
        ("phimoe", {"num_experts_per_tok": 3}, "2 experts only"),
    ],
)
def test_routers_that_cannot_be_are_refused(
    family: str, overrides: dict[str, Any], problem: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = rewrite(checkpoint(family), tmp_path / "model", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **overrides}))
    with pytest.raises(InputError, match=problem):
        Model.open(folder)


def test_a_router_that_adds_two_scores_needs_two_experts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("glm4_moe", num_experts_per_tok=1)
    with pytest.raises(InputError, match="at least 2 experts"):
        operate("merge", "m-smoe", source, tmp_path / "out", experts=1, dry_run=True)
    operate("merge", "m-smoe", source, tmp_path / "out", experts=2, tokens=128)
    stock(tmp_path / "out")(input_ids=token_ids(source))


def test_one_number_for_all_layers_may_be_a_list(checkpoint: Checkpoint) -> None:
    assert Model.open(checkpoint("hunyuan_v1_moe", moe_topk=[2, 2, 2])).rule.top_k == 2


@pytest.mark.parametrize("chosen", [0, 2])
def test_shared_experts_may_be_absent(chosen: int, checkpoint: Checkpoint) -> None:
    ernie = Model.open(checkpoint("ernie4_5_moe", moe_num_shared_experts=chosen, use_bias=False))
    assert bool(ernie.moe_layers[0].shared) == bool(chosen)
    granite = Model.open(checkpoint("granitemoeshared", shared_intermediate_size=8 * chosen))
    assert bool(granite.moe_layers[0].shared) == bool(chosen)
