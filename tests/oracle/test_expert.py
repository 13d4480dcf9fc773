"""Operations on experts by name, against stock models whose tensors are changed in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.methods import load
from tests.oracle.helpers import custom, drift, logits, operate, stock, tensors, token_ids

Checkpoint = Callable[..., Path]


def chosen_in_memory(source: Path, kept: list[list[int]], top_k: int | None = None) -> Any:
    """The stock model with other experts: every tensor that counts them is indexed in memory."""
    model = stock(source)
    experts = Model.open(source).experts
    for layer, stay in zip(Model.open(source).moe_layers, kept, strict=True):
        mlp = model.model.layers[layer.index].get_submodule("mlp")
        for module in mlp.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if value.shape[0] == experts:
                    setattr(module, name, torch.nn.Parameter(value[stay]))
            for name, value in list(module.named_buffers(recurse=False)):
                if value.shape[0] == experts:
                    setattr(module, name, value[stay])
            for name in ("num_experts", "n_routed_experts"):
                if hasattr(module, name):
                    setattr(module, name, len(stay))
            if top_k is not None and hasattr(module, "top_k"):
                module.top_k = top_k
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "flex_olmo", "olmoe"])
def test_dropping_is_the_stock_model_without_those_experts(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family, layout="fused" if family == "olmoe" else "per-expert")
    operate("expert", "drop", source, tmp_path / "out", which="0:1,4;1:0,7;2:2-3")
    kept = [[e for e in range(8) if e not in gone] for gone in ([1, 4], [0, 7], [2, 3])]
    ids = token_ids(source)
    with torch.no_grad():
        wanted = chosen_in_memory(source, kept)(input_ids=ids).logits
    torch.testing.assert_close(logits(tmp_path / "out", ids), wanted, rtol=0, atol=1e-5)


def test_layers_may_lose_different_numbers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Padded where the router has a bias that makes it exact, with model code elsewhere."""
    for family, tier, loader in (("mixtral", "custom", custom), ("minimax_m2", "padded", stock)):
        source = checkpoint(family)
        result = operate("expert", "drop", source, tmp_path / family, which="0:1,4;2:2")
        assert result["tier"] == tier
        kept = [[e for e in range(8) if e not in gone] for gone in ([1, 4], [], [2])]
        ids = token_ids(source)
        with torch.no_grad():
            wanted = chosen_in_memory(source, kept)(input_ids=ids).logits
            found = loader(tmp_path / family)(input_ids=ids).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_opting_out_lowers_what_a_token_selects(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("flex_olmo", num_experts_per_tok=5)
    operate("expert", "opt-out", source, tmp_path / "out", which="1,3-4,6,7")
    ids = token_ids(source)
    with torch.no_grad():
        wanted = chosen_in_memory(source, [[0, 2, 5]] * 3, top_k=3)(input_ids=ids).logits
    torch.testing.assert_close(logits(tmp_path / "out", ids), wanted, rtol=0, atol=1e-5)
    assert stock(tmp_path / "out").config.num_experts_per_tok == 3


def test_the_public_expert_stays(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the public one"):
        operate("expert", "opt-out", checkpoint("flex_olmo"), tmp_path / "out", which="0")


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "minimax_m2", "deepseek_v3", "granitemoe"])
def test_copies_of_all_experts_share_their_weight(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Every expert twice and twice as many selected: softmax and normalised sigmoid alike spread the weight."""
    source = checkpoint(family)
    result = operate("expert", "add", source, tmp_path / "out", copy="0-7", top_k=4)
    assert result["exactness"]["kind"] == "exact"
    assert drift(source, tmp_path / "out") < 1e-4


@pytest.mark.parametrize("family", ["minimax_m2", "deepseek_v3", "gpt_oss"])
def test_barred_experts_change_nothing(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(family)
    result = operate(
        "expert", "add", source, tmp_path / "out", copy="0-2", rows="normal", barred=True
    )
    assert result["exactness"]["kind"] == "exact"
    # A router of another size may sum in another order; nothing else differs.
    assert drift(source, tmp_path / "out") < 1e-5
    with pytest.raises(InputError, match="cannot be barred"):
        operate("expert", "add", checkpoint("mixtral"), tmp_path / "no", copy="0", barred=True)


def test_a_copy_of_the_only_selected_expert_is_as_good(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("mixtral", num_experts_per_tok=1)
    operate("expert", "add", source, tmp_path / "out", copy="2,5")
    assert drift(source, tmp_path / "out") < 1e-5


def test_a_dense_model_becomes_an_expert(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Grown from one seed, a mixture takes in a further branch: the same as if it had been there from the start."""
    seed, branch = checkpoint("llama"), checkpoint("llama", seed=1)
    operate("upcycle", "sparse", seed, tmp_path / "moe", experts=3, top_k=2)
    operate("expert", "add", [tmp_path / "moe", branch], tmp_path / "out", rows="normal")
    found, dense = tensors(tmp_path / "out"), tensors(branch)
    for leaf, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        new = found[f"model.layers.1.block_sparse_moe.experts.3.{leaf}.weight"]
        assert torch.equal(new, dense[f"model.layers.1.mlp.{name}.weight"])
    before = tensors(tmp_path / "moe")["model.layers.1.block_sparse_moe.gate.weight"]
    rows = found["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(rows[:3], before)
    assert 0 < rows[3].std() < 0.05
    stock(tmp_path / "out")


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ("8", UsageError, "has no expert 8"),
        ("1,1", UsageError, "names a number twice"),
        ("a", UsageError, "is no number"),
        ("5-3", UsageError, "is no number"),
        ("9:1", UsageError, "layer 9 has no experts"),
        ("0:1;0:2", UsageError, "layer 0 is named twice"),
        ("0-6", InputError, "fewer than the 2"),
    ],
)
def test_lists_that_mean_nothing_are_refused(
    which: str, error: type[Exception], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        operate("expert", "drop", checkpoint("mixtral"), tmp_path / "out", which=which)


def test_groups_lose_equally_many(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint("deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(InputError, match="groups"):
        operate("expert", "drop", source, tmp_path / "out", which="0,1")
    operate("expert", "drop", source, tmp_path / "out", which="0,5,1,6")
    stock(tmp_path / "out")


@pytest.mark.parametrize("name", ["drop", "opt-out", "add"])
def test_what_has_no_experts_is_refused(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    options = {"copy": "0"} if name == "add" else {"which": "1"}
    with pytest.raises(InputError, match="has no experts to"):
        operate("expert", name, checkpoint("llama"), tmp_path / "out", **options)
    assert load("expert", name).info.summary


def test_dense_models_that_do_not_fit_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    mixture = checkpoint("mixtral")
    cases = {
        "neurons": checkpoint("llama", intermediate_size=64),
        "hidden": checkpoint("llama", hidden_size=48),
        "layers is 2": checkpoint("llama", num_hidden_layers=2),
        "is a mixture": checkpoint("mixtral", seed=1),
        "hidden_act": checkpoint("llama", hidden_act="gelu"),
    }
    for message, other in cases.items():
        with pytest.raises(InputError, match=message):
            operate("expert", "add", [mixture, other], tmp_path / "out")


@pytest.mark.parametrize("family", ["minimax_m2", "deepseek_v3", "glm4_moe", "dots1", "gpt_oss"])
def test_padding_changes_no_index_and_no_weight(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint(family)
    result = operate("expert", "pad", source, tmp_path / "out", experts=12)
    assert result["exactness"]["kind"] == "exact"
    ids = token_ids(source)
    before, after = stock(source), stock(tmp_path / "out")
    routed: list[list[Any]] = [[], []]
    for found, model in zip(routed, (before, after), strict=True):
        for name, module in model.named_modules():
            if name.endswith("experts") and hasattr(module, "down_proj"):
                module.register_forward_pre_hook(lambda _, given, found=found: found.append(given))
    with torch.no_grad():
        difference = before(input_ids=ids).logits - after(input_ids=ids).logits
    assert len(routed[0]) == len(routed[1]) > 0
    for one, other in zip(*routed, strict=True):
        for mine, padded in zip(one, other, strict=True):
            torch.testing.assert_close(mine, padded, rtol=0, atol=1e-5)
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "ernie4_5_moe"])
def test_padding_is_refused_where_a_softmax_sees_it(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="cannot be padded exactly"):
        operate("expert", "pad", checkpoint(family), tmp_path / "out", experts=12)
    with pytest.raises(UsageError, match="has 8 already"):
        operate("expert", "pad", checkpoint(family), tmp_path / "out", experts=8)
