"""Outputs whose layers have different numbers of experts, or whose router rows share them, against stock classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures import families
from moesurg.surgery.architectures.model import Experts, Model
from moesurg.surgery.errors import InputError
from moesurg.surgery.methods._forms import mapped, ragged
from moesurg.surgery.methods.prune import _prune, aimer
from moesurg.surgery.modeling import moesurg_mixtures
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.faults.harness import digest
from tests.oracle.helpers import (
    assert_generates,
    custom,
    operate,
    rewrite,
    stock,
    tensors,
    token_ids,
)

Checkpoint = Callable[..., Path]
MIXTURES = sorted(name for name, family in families().items() if family.moe is not None)
ROUTED = [name for name in MIXTURES if (moe := families()[name].moe) and moe.stock.call == "routed"]
PADDED = ["deepseek_v3", "dots1", "glm4_moe", "gpt_oss", "minimax_m2"]


@pytest.fixture
def drop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, list[int]]]:
    """Makes ``prune --method aimer`` keep other numbers in every layer, and says which."""

    def set_up(source: Path, tier: Any = "auto") -> dict[int, list[int]]:
        layers = [layer.index for layer in Model.open(source).moe_layers]
        kept = {index: [0, 2, 3, 5, 6, 7][index % 3 :] for index in layers}
        counts = {index: len(experts) for index, experts in kept.items()}
        assert len(set(counts.values())) > 1
        decided = {str(index): {"kept": experts} for index, experts in kept.items()}
        monkeypatch.setattr(aimer, "decide_from_weights", lambda *_: decided)

        def settle(models: Any, options: Any, decisions: Any) -> Any:
            assert decisions == decided
            return _prune.plan_prune(models, options.experts, counts=counts)

        monkeypatch.setattr(aimer, "settle", settle, raising=False)
        monkeypatch.setattr(_prune, "ragged", lambda *args: ragged(*args, tier=tier))
        return kept

    return set_up


def in_memory(source: Path, kept: dict[int, list[int]]) -> Any:
    """The stock model with the other experts cut out of its modules."""
    facts, model = Model.open(source), stock(source)
    for layer in facts.moe_layers:
        experts = layer.experts
        assert experts is not None
        block = model.model.layers[layer.index]
        index = torch.tensor(kept[layer.index])
        for name in experts.stock.shapes(experts.count, experts.hidden, experts.width):
            place, _, leaf = name.rpartition(".")
            owner = block.get_submodule(place)
            old = getattr(owner, leaf)
            new = old.detach().index_select(list(old.shape).index(8), index)
            setattr(
                owner, leaf, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new
            )
        for name, module in block.named_modules():
            if "attention" not in name and getattr(module, "num_experts", 0) == 8:
                module.num_experts = len(index)
    return model


def outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("family", MIXTURES)
def test_layers_of_different_sizes(
    family: str, checkpoint: Checkpoint, tmp_path: Path, drop: Callable[..., Any]
) -> None:
    """Custom everywhere, and padded for stock classes where that is exact: the model cut in memory."""
    source = checkpoint(family)
    kept = drop(source, "custom")
    result = operate("prune", "aimer", source, tmp_path / "custom", experts=5)
    assert result["tier"] == "custom"
    ids = token_ids(source, rows=2)
    wanted = outputs(in_memory(source, kept), ids)
    found = custom(tmp_path / "custom")
    torch.testing.assert_close(outputs(found, ids), wanted, atol=1e-5, rtol=1e-5)
    assert_generates(found, ids)
    if family in PADDED:
        drop(source)
        result = operate("prune", "aimer", source, tmp_path / "padded", experts=5)
        assert result["tier"] == "padded"
        padded = stock(tmp_path / "padded")
        torch.testing.assert_close(outputs(padded, ids), wanted, atol=1e-5, rtol=1e-5)
        assert_generates(padded, ids)
        assert verify(str(tmp_path / "padded"), reference=None, device="cpu", progress=Silent())
    else:
        model = Model.open(source)
        with pytest.raises(InputError, match="cannot be padded exactly"):
            ragged(model, {index: len(experts) for index, experts in kept.items()}, tier="padded")


def test_different_sizes_verify_and_do_not_depend_on_the_order_of_units(
    checkpoint: Checkpoint, tmp_path: Path, drop: Callable[..., Any]
) -> None:
    source = checkpoint("qwen3_moe", dtype="bfloat16")
    drop(source)
    operate("prune", "aimer", source, tmp_path / "one", experts=5)
    operate("prune", "aimer", source, tmp_path / "two", experts=5)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    found = verify(str(tmp_path / "one"), reference=None, device="cpu", progress=Silent())
    assert found["verified"]
    assert found["exactness"]["measured"] > 0
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    entry = json.loads((tmp_path / "one" / "config.json").read_text())["moesurg_mixtures"]
    kept = {index: len(layer["kept"]) for index, layer in report["decisions"].items()}
    assert entry["layers"] == kept


@pytest.mark.parametrize("family", ROUTED)
def test_a_mapped_router_is_the_tied_one_without_repetition(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    for router in ("tied", "mapped"):
        out = tmp_path / router
        operate("merge", "m-smoe", source, out, experts=3, router=router, tokens=128)
    ids = token_ids(source, rows=2)
    found, wanted = custom(tmp_path / "mapped"), stock(tmp_path / "tied")
    torch.testing.assert_close(outputs(found, ids), outputs(wanted, ids), atol=1e-5, rtol=1e-5)
    assert_generates(found, ids)
    assert verify(str(tmp_path / "mapped"), reference=None, device="cpu", progress=Silent())
    decisions = json.loads((tmp_path / "mapped" / "report.json").read_text())["decisions"]
    model, written = Model.open(source), tensors(tmp_path / "mapped")
    for layer in model.moe_layers:
        assert layer.experts is not None
        place = f"{layer.prefix}{layer.experts.stock.modules[1]}."
        rows = written[place + moesurg_mixtures.ROW_MAP].tolist()
        for slot, group in enumerate(decisions[str(layer.index)]["groups"]):
            assert [row for row in range(8) if rows[row] == slot] == group
        down = layer.experts.stock.names["down"]
        assert written[layer.prefix + down].shape[0] == 3


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe", "gpt_oss"])
def test_a_mapped_output_expands_to_the_tied_one(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Every tensor of it, byte for byte; layers of different sizes are refused."""
    source = checkpoint(family, dtype="bfloat16", layout="fused")
    for router in ("tied", "mapped"):
        out = tmp_path / router
        operate("merge", "m-smoe", source, out, experts=3, router=router, tokens=128)
    result = operate("convert", "expand", tmp_path / "mapped", tmp_path / "out", expand=True)
    assert result["exactness"]["kind"] == "bitwise"
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "tied")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert Model.open(tmp_path / "out").experts == 8
    stock(tmp_path / "out")


def test_different_sizes_do_not_expand(
    checkpoint: Checkpoint, tmp_path: Path, drop: Callable[..., Any]
) -> None:
    source = checkpoint("qwen3_moe")
    drop(source)
    operate("prune", "aimer", source, tmp_path / "ragged", experts=5)
    with pytest.raises(InputError, match="different numbers of experts"):
        operate("convert", "expand", tmp_path / "ragged", tmp_path / "out", expand=True)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_selected_rows_of_one_expert_add_up_however_stock_computes(
    implementation: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("mixtral", num_experts_per_tok=3, hidden_size=64, intermediate_size=64)
    operate("merge", "m-smoe", source, tmp_path / "out", experts=3, router="mapped", tokens=128)
    model, ids = custom(tmp_path / "out"), token_ids(source, rows=2)
    model.set_experts_implementation("eager")
    wanted = outputs(model, ids)
    model.set_experts_implementation(implementation)
    torch.testing.assert_close(outputs(model, ids), wanted, atol=1e-5, rtol=1e-5)


def test_a_mapped_merge_is_reconstructed_as_the_tied_one(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("qwen3_moe")
    options = {"experts": 4, "reconstruct": True, "sample": 128, "tokens": 256}
    for router in ("tied", "mapped"):
        operate("merge", "m-smoe", source, tmp_path / router, router=router, **options)
    ids = token_ids(source)
    found, wanted = custom(tmp_path / "mapped"), stock(tmp_path / "tied")
    torch.testing.assert_close(outputs(found, ids), outputs(wanted, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_both_layouts_give_the_same_custom_bytes(
    layout: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Custom outputs have one layout, that of the stock modules."""
    source = checkpoint("olmoe", layout=layout)
    operate("merge", "m-smoe", source, tmp_path / "out", experts=3, router="mapped", tokens=128)
    other = tmp_path / "other"
    again = checkpoint("olmoe")
    operate("merge", "m-smoe", again, other, experts=3, router="mapped", tokens=128)
    first, second = tensors(tmp_path / "out"), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("command", ["merge", "prune"])
def test_jetmoe_has_fewer_feed_forwards_with_our_code(
    command: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Its attention keeps all experts, which no stock class can hold beside fewer feed-forwards."""
    source = checkpoint("jetmoe")
    method = {"merge": "m-smoe", "prune": "frequency"}[command]
    result = operate(command, method, source, tmp_path / "out", experts=4, tokens=128)
    assert result["tier"] == "custom"
    model = custom(tmp_path / "out")
    assert_generates(model, token_ids(source))
    assert model.model.layers[0].mlp.input_linear.weight.shape[0] == 4
    assert model.model.layers[0].self_attention.experts.input_linear.weight.shape[0] == 8
    if command == "prune":
        decisions = json.loads((tmp_path / "out" / "report.json").read_text())["decisions"]
        kept = {int(index): layer["kept"] for index, layer in decisions.items()}
        ids = token_ids(source)
        wanted = outputs(in_memory(source, kept), ids)
        torch.testing.assert_close(outputs(model, ids), wanted, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused_from_the_headers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for family in ("jetmoe", "llama4_text"):
        with pytest.raises(InputError, match="do not call experts by index"):
            mapped(Model.open(checkpoint(family)), {1: 4, 2: 4})
    grouped = Model.open(checkpoint("deepseek_v3", n_group=4, topk_group=2))
    with pytest.raises(InputError, match="groups"):
        ragged(grouped, {1: 8, 2: 4})
    plain = Model.open(checkpoint("qwen3_moe"))
    with pytest.raises(InputError, match=r"layer 1 cannot have 1 experts; its router needs 2 to 8"):
        ragged(plain, {0: 4, 1: 1, 2: 4})
    # Types that one fused tensor cannot hold together.
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    source = checkpoint("qwen3_moe")
    change = {
        name.format(expert): tensors(source)[name.format(expert)].bfloat16() for expert in range(8)
    }
    mixed = rewrite(source, tmp_path / "mixed", change)
    with pytest.raises(InputError, match="BF16"):
        operate("merge", "m-smoe", mixed, tmp_path / "out", experts=4, router="mapped")


def test_padding_of_half_precision_is_finite(
    checkpoint: Checkpoint, tmp_path: Path, drop: Callable[..., Any]
) -> None:
    source = checkpoint("minimax_m2")
    half = rewrite(
        source, tmp_path / "half", {name: value.half() for name, value in tensors(source).items()}
    )
    drop(half)
    operate("prune", "aimer", half, tmp_path / "out", experts=5)
    assert outputs(stock(tmp_path / "out"), token_ids(source)).isfinite().all()


def test_model_code_refuses_what_it_does_not_hold(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    operate("merge", "m-smoe", source, tmp_path / "out", experts=4, router="mapped", tokens=128)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["moesurg_mixtures"]["layers"]["1"] = 9
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="layer 1 cannot have 9 experts"):
        custom(tmp_path / "out")


def test_names_are_those_of_the_model_code() -> None:
    """Planning must not import torch, so that it repeats two names."""
    from moesurg.surgery.methods import _forms, _stored

    assert moesurg_mixtures.KEY == _forms.KEY
    assert moesurg_mixtures.ROW_MAP == _stored.ROW_MAP


def test_a_stored_mixture_survives_json(checkpoint: Checkpoint) -> None:
    form = ragged(Model.open(checkpoint("glm4_moe")), {1: 5, 2: 4})
    for layer in form.model.moe_layers:
        stored = form.of(layer)
        experts: Experts | None = layer.experts
        assert experts is not None
        again = type(stored).from_json(json.loads(json.dumps(stored.to_json())))
        assert again.padding(experts) == stored.padding(experts)
        assert bool(stored.padding(experts)) == (layer.index == 2)
