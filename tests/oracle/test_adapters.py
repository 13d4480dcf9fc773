"""Reading, merging and writing adapters, held against PEFT and against dense products in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moesurg.surgery.adapters.adapter import Adapter
from moesurg.surgery.checkpoint.reader import open_checkpoint
from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.packs import Pack
from moesurg.surgery.sources import kind_of
from tests.oracle.helpers import operate, peft, stock, token_ids

Checkpoint = Callable[..., Path]
SHELF: list[dict[str, Any]] = [
    {"seed": 1, "rank": 2, "alpha": 8},
    {"seed": 2, "rank": 3, "alpha": 16, "use_rslora": True},
    {
        "seed": 3,
        "rank": 4,
        "alpha": 5,
        "targets": ("self_attn.q_proj", "mlp.down_proj"),
        "rank_pattern": {"model.layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"down_proj": 7},
    },
]
"""Ranks, alphas, scalings and targets that differ."""
SINGLE: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 7},
    "rslora": {"use_rslora": True},
    "patterns": SHELF[2],
    "bias": {"lora_bias": True},
}


def shelf(checkpoint: Checkpoint, **common: Any) -> list[Path]:
    return [checkpoint("adapter", **{**entry, **common}) for entry in SHELF]


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """The change of every module's weight, float64, straight from PEFT's definition."""
    adapter, stored = Adapter.open(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, module in adapter.modules.items():
        down, up = (stored[region.tensor].double() for region in (module.down, module.up))
        found[name] = module.scale * up @ down
    return found


def summed(folders: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, change in changes(folder).items():
            found[name] = found.get(name, torch.zeros_like(change)) + weight * change
    return found


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def outputs(base: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = peft(base, folder)(input_ids=token_ids(base)).logits
    return found


@pytest.mark.parametrize("name", SINGLE)
def test_one_adapter_is_itself(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """PEFT's own merger fails this with rank-stabilised scaling and with biases."""
    base, source = checkpoint("llama"), checkpoint("adapter", **SINGLE[name])
    operate("merge", "cat", source, tmp_path / "out")
    assert (outputs(base, source) - outputs(base, tmp_path / "out")).abs().max() < 1e-4


def test_peft_sees_the_scales_that_we_see(checkpoint: Checkpoint) -> None:
    base = checkpoint("llama")
    for folder in shelf(checkpoint):
        adapted = peft(base, folder)
        for name, module in Adapter.open(folder).modules.items():
            layer = adapted.base_model.model.get_submodule(name)
            assert layer.scaling["default"] == pytest.approx(module.scale)


def test_stacking_is_the_weighted_sum(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders, weights = shelf(checkpoint), [0.5, -2.0, 1.25]
    operate("merge", "cat", folders, tmp_path / "out", weights="0.5,-2,1.25")
    assert distance(changes(tmp_path / "out"), summed(folders, weights)) < 1e-5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["format"] == "adapter"
    assert max(unit["error"] for unit in report["units"].values()) < 1e-12
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False


def test_stacking_agrees_with_peft(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    folders = [checkpoint("adapter", seed=seed, rank=3, alpha=6) for seed in (1, 2)]
    adapted = peft(base, folders[0])
    adapted.load_adapter(str(folders[1]), adapter_name="second")
    adapted.add_weighted_adapter(["default", "second"], [0.5, 2.0], "sum", "cat")
    adapted.set_adapter("sum")
    with torch.no_grad():
        expected = adapted(input_ids=token_ids(base)).logits
    operate("merge", "cat", folders, tmp_path / "out", weights="0.5,2")
    assert (outputs(base, tmp_path / "out") - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"blocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"monteclora_config": {"n": 2}}, "monteclora_config"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"r": 5}, "are not of the rank 5"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"lora_alpha": "8"}, "lora_alpha should be a number"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    config: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("adapter", rank=3)
    folder = tmp_path / "adapter"
    folder.mkdir()
    document = json.loads((source / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    weights = (source / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        operate("merge", "cat", folder, tmp_path / "out")
    assert str(folder) in caught.value.message
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({f"{MODULE}.lora_magnitude_vector": torch.ones(32)}, "DoRA"),
        ({f"{MODULE}.base_layer.weight": torch.ones(32, 32)}, "weight of the base model"),
        ({"base_model.model.lm_head.weight": torch.ones(4, 4)}, "modules_to_save"),
        ({"lm_head.weight": torch.ones(4, 4)}, "does not begin with"),
        ({f"{MODULE}_x.lora_A.weight": torch.ones(3, 32)}, "but no lora_B.weight"),
        ({f"{MODULE}.lora_B.bias": torch.ones(32)}, "has lora_B.bias"),
        ({f"{MODULE}.lora_B.weight": torch.ones(32, 2)}, "are not of the rank"),
    ],
)
def test_tensors_that_are_not_understood_are_refused(
    extra: dict[str, torch.Tensor], message: str, checkpoint: Checkpoint
) -> None:
    folder = checkpoint("adapter", extra=extra)
    with pytest.raises(InputError, match=message):
        Adapter.open(folder)


def test_adapters_of_two_bases_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one, other = checkpoint("adapter"), checkpoint("adapter", base_model_name_or_path="other/base")
    with pytest.raises(InputError, match="base_model_name_or_path is 'other/base'"):
        operate("merge", "cat", [one, other], tmp_path / "out")


def test_a_method_says_what_it_takes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes adapters, the sources are models") as caught:
        operate("merge", "cat", checkpoint("qwen3_moe"), tmp_path / "out")
    assert caught.value.hint is not None
    assert "m-smoe" in caught.value.hint
    with pytest.raises(InputError, match="takes models, the sources are adapters") as caught:
        operate("merge", "m-smoe", checkpoint("adapter"), tmp_path / "out", experts=2)
    assert caught.value.hint is not None
    assert "cat" in caught.value.hint


def test_what_a_folder_is_instead_is_told(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """An adapter, a pack or several folders where something else is needed, each with what to do."""
    adapter = checkpoint("adapter", seed=1)
    with pytest.raises(InputError, match="is an adapter, and a model is needed") as caught:
        open_checkpoint(adapter)
    assert "adapter apply" in str(caught.value.hint)
    with pytest.raises(InputError, match="is no pack") as caught:
        Pack.open(adapter)
    assert "rmm" in str(caught.value.hint)
    operate("adapter", "split", adapter, tmp_path / "split")
    for refused in (open_checkpoint, lambda folder: kind_of([adapter, folder])):
        with pytest.raises(InputError, match="holds several folders") as caught:
            refused(tmp_path / "split")
        assert str(tmp_path / "split" / "expert_0") in str(caught.value.hint)
    pair = [adapter, checkpoint("adapter", seed=2)]
    operate("merge", "rmm", pair, tmp_path / "pack", basis=1, allow_larger=True)
    with pytest.raises(InputError, match="is a pack, and a model is needed") as caught:
        open_checkpoint(tmp_path / "pack")
    assert "moesurg revert" in str(caught.value.hint)
    with pytest.raises(InputError, match="is a model among adapters") as caught:
        operate("merge", "cat", [adapter, checkpoint("llama")], tmp_path / "out")
    assert "adapters alone" in str(caught.value.hint)


@pytest.mark.parametrize("weights", ["1", "1,x", "1,2,3", "1,inf", "1,nan"])
def test_weights_have_to_fit(weights: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    folders = [checkpoint("adapter", seed=seed) for seed in (1, 2)]
    with pytest.raises(UsageError, match="--weights"):
        operate("merge", "cat", folders, tmp_path / "out", weights=weights)


def saved_by_peft(model: Any, folder: Path, **config: Any) -> Any:
    """PEFT's own adapter with random factors on a model, saved; returns the adapted model."""
    import warnings

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wanted = LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **config)
    adapted: Any = get_peft_model(model, wanted)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "modules_to_save" in name and "lora" not in name:
                value.add_(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's config on the Hub
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return adapted.eval()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ],
    ids=["embedding", "saved-in-full", "rslora"],
)
def test_an_adapter_that_peft_wrote_stays_itself(
    config: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    adapted = saved_by_peft(stock(base), tmp_path / "in", task_type="CAUSAL_LM", **config)
    with torch.no_grad():
        expected = adapted(input_ids=token_ids(base)).logits
    operate("merge", "cat", tmp_path / "in", tmp_path / "out")
    assert (outputs(base, tmp_path / "out") - expected).abs().max() < 1e-4


class Convolutions(torch.nn.Module):
    """A model with a convolution of each dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv1d(4, 6, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(3, 5, (3, 2))

    def forward(self, signal: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv1(signal).flatten(1), self.conv2(image).flatten(1)], dim=1)


def test_convolutions_keep_their_kernels(tmp_path: Path) -> None:
    """PEFT's own truncating merger fails on some of them."""
    from peft import PeftModel

    torch.manual_seed(1)
    model = Convolutions()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = saved_by_peft(model, tmp_path / "in", target_modules=["conv1", "conv2"])
    inputs = (torch.randn(2, 4, 9), torch.randn(2, 3, 8, 7))
    with torch.no_grad():
        expected = adapted(*inputs)
    operate("merge", "svd", tmp_path / "in", tmp_path / "out")
    fresh: Any = Convolutions()
    fresh.load_state_dict(state)
    loader: Any = PeftModel
    again = loader.from_pretrained(fresh, str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs), expected, atol=1e-4, rtol=1e-4)
