"""Tools for adapters, against PEFT, planted changes and dense products."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.errors import InputError, UsageError, VerificationError
from moesurg.surgery.progress import Silent
from moesurg.surgery.verification import verify
from tests.oracle.helpers import logits, operate, peft, rewrite, stock, tensors, token_ids
from tests.oracle.test_adapters import changes, distance, shelf

Checkpoint = Callable[..., Path]


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 2e-4) -> bool:
    return float((first - second).abs().max()) < tolerance


def adapted(base: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = peft(base, folder)(input_ids=token_ids(base)).logits
    return found


def planted(source: Path, target: Path, rank: int, names: list[str]) -> Path:
    """A fine-tune whose named matrices changed by a product of a rank."""
    generator = torch.Generator().manual_seed(3)
    stored, change = tensors(source), {}
    for name in names:
        rows, columns = stored[name].shape
        product = torch.randn(rows, rank, generator=generator) @ torch.randn(
            rank, columns, generator=generator
        )
        change[name] = stored[name] + 0.05 * product
    return rewrite(source, target, change)


# Extract


def test_a_planted_change_is_found_whole(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 2)]
    names.append("model.layers.1.mlp.down_proj.weight")
    tuned = planted(base, tmp_path / "tuned", 3, names)
    operate("adapter", "extract", [base, tuned], tmp_path / "out", energy=1 - 1e-9)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 3
    assert config["rank_pattern"] == {}
    assert config["target_modules"] == sorted(name.removesuffix(".weight") for name in names)
    assert close(adapted(base, tmp_path / "out"), logits(tuned, token_ids(base)))
    operate("adapter", "apply", [base, tmp_path / "out"], tmp_path / "back")
    for name, value in tensors(tuned).items():
        torch.testing.assert_close(tensors(tmp_path / "back")[name], value, atol=1e-5, rtol=1e-4)


def test_experts_become_targeted_parameters(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("qwen3_moe")
    names = [
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"
        for expert in (1, 5)
        for part in ("gate", "up", "down")
    ]
    tuned = planted(base, tmp_path / "tuned", 2, names)
    operate("adapter", "extract", [base, tuned], tmp_path / "out", rank=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    operate("adapter", "apply", [base, tmp_path / "out"], tmp_path / "back", expert_layout="peft")
    for name, value in tensors(tuned).items():
        torch.testing.assert_close(tensors(tmp_path / "back")[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("changed", ["model.norm.weight", "lm_head.weight"])
def test_what_an_adapter_does_not_hold_is_refused_or_counted(
    changed: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    names = ["model.layers.0.self_attn.q_proj.weight"]
    middle = planted(base, tmp_path / "middle", 2, names)
    tuned = rewrite(middle, tmp_path / "tuned", {changed: tensors(base)[changed] + 0.1})
    with pytest.raises(InputError, match=f"1 tensors changed .* '{changed}' first"):
        operate("adapter", "extract", [base, tuned], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = operate("adapter", "extract", [base, tuned], tmp_path / "out", rest="skip")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any(changed in note for note in report["notes"])
    assert result["tier"] == "stock"


@pytest.mark.parametrize("tied", [False, True])
def test_norms_embeddings_and_heads_are_saved_in_full(
    tied: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint("qwen3", tie_word_embeddings=tied)
    middle = planted(base, tmp_path / "middle", 2, ["model.layers.0.self_attn.q_proj.weight"])
    changed = [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.embed_tokens.weight",
    ]
    generator = torch.Generator().manual_seed(0)
    change = {
        name: tensors(base)[name] + 0.1 * torch.randn(shape, generator=generator)
        for name in changed
        for shape in [tensors(base)[name].shape]
    }
    tuned = rewrite(middle, tmp_path / "tuned", change)
    operate("adapter", "extract", [base, tuned], tmp_path / "out", rest="save", rank=2)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    saved = {name.removesuffix(".weight") for name in changed} | ({"lm_head"} if tied else set())
    assert set(config["modules_to_save"]) == saved
    with warnings.catch_warnings():
        # PEFT sees that both ends of the tie are there, which is what keeps them equal.
        warnings.filterwarnings("ignore", message="Model has .tie_word_embeddings")
        assert close(adapted(base, tmp_path / "out"), logits(tuned, token_ids(base)))
    operate("adapter", "apply", [base, tmp_path / "out"], tmp_path / "back")
    for name, value in tensors(tmp_path / "back").items():
        torch.testing.assert_close(value, tensors(tuned)[name], atol=1e-5, rtol=1e-4)
        assert torch.equal(value, tensors(tuned)[name]) or name not in changed
    operate("merge", "svd", tmp_path / "out", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert set(again["modules_to_save"]) == saved


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_what_peft_cannot_save_is_refused(
    family: str, name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(family)
    middle = planted(base, tmp_path / "middle", 2, ["model.layers.0.self_attn.q_proj.weight"])
    tuned = rewrite(middle, tmp_path / "tuned", {name: tensors(base)[name] + 0.1})
    with pytest.raises(InputError, match="cannot be saved in an adapter"):
        operate("adapter", "extract", [base, tuned], tmp_path / "out", rest="save")


def test_nothing_to_extract(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    with pytest.raises(InputError, match="no linear layer differs"):
        operate("adapter", "extract", [base, base], tmp_path / "out")
    with pytest.raises(InputError, match="1 models were given"):
        operate("adapter", "extract", base, tmp_path / "out")
    with pytest.raises(InputError, match="is qwen3"):
        operate("adapter", "extract", [base, checkpoint("qwen3")], tmp_path / "out")


def test_randomised_extraction_is_nearly_optimal(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tuned = planted(base, tmp_path / "tuned", 20, [name])
    errors = {}
    for fast in (False, True):
        out = tmp_path / str(fast)
        operate("adapter", "extract", [base, tuned], out, rank=5, fast=fast)
        report = json.loads((out / "report.json").read_text())
        errors[fast] = report["units"][name.removesuffix(".weight")]["error"]
    change = tensors(tuned)[name].double() - tensors(base)[name].double()
    values = torch.linalg.svdvals(change)
    assert errors[False] == pytest.approx(float(values[5:].norm() / values.norm()), rel=1e-4)
    assert errors[False] - 1e-9 <= errors[True] < 1.05 * errors[False]


# Apply


def test_applied_adapters_compute_what_peft_computes(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint("llama")
    for index, folder in enumerate(shelf(checkpoint)):
        operate("adapter", "apply", [base, folder], tmp_path / str(index))
        stock(tmp_path / str(index))
        assert close(adapted(base, folder), logits(tmp_path / str(index), token_ids(base)))


def test_applying_several_is_applying_their_sum(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base, folders = checkpoint("llama"), shelf(checkpoint)
    operate("adapter", "apply", [base, *folders], tmp_path / "one", weights="1,0.5,-1")
    operate("merge", "cat", folders, tmp_path / "sum", weights="1,0.5,-1")
    operate("adapter", "apply", [base, tmp_path / "sum"], tmp_path / "two")
    for name, value in tensors(tmp_path / "one").items():
        torch.testing.assert_close(tensors(tmp_path / "two")[name], value, atol=1e-5, rtol=1e-4)


def saving(checkpoint: Checkpoint, base: Path, *names: str, seed: int = 0) -> Path:
    """An adapter that saves modules of the base in full, with other values in each."""
    extra = {
        f"base_model.model.{name}.weight": torch.randn(
            tensors(base)["model.embed_tokens.weight"].shape,
            generator=torch.Generator().manual_seed(seed + index),
        )
        for index, name in enumerate(names)
    }
    return checkpoint("adapter", extra=extra, modules_to_save=list(names), seed=seed)


def test_replaced_modules_have_to_fit(checkpoint: Checkpoint, tmp_path: Path) -> None:
    base, tied = checkpoint("llama"), checkpoint("llama", tie_word_embeddings=True)
    out = tmp_path / "out"
    head = saving(checkpoint, base, "lm_head")
    operate("adapter", "apply", [base, head], tmp_path / "one")
    assert close(adapted(base, head), logits(tmp_path / "one", token_ids(base)))
    with pytest.raises(InputError, match="ties to the embedding"):
        operate("adapter", "apply", [tied, head], out)
    with pytest.raises(InputError, match="so does another adapter"):
        operate("adapter", "apply", [base, head, saving(checkpoint, base, "lm_head", seed=5)], out)
    both = saving(checkpoint, base, "model.embed_tokens", "lm_head")
    with pytest.raises(InputError, match="head and embedding differ"):
        operate("adapter", "apply", [tied, both], out)
    with pytest.raises(InputError, match="is no tensor of"):
        operate("adapter", "apply", [base, saving(checkpoint, base, "model.other")], out)
    assert not out.exists()


def test_an_adapter_of_another_base_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("adapter")
    with pytest.raises(InputError, match=r"module .* is linear of"):
        operate("adapter", "apply", [checkpoint("llama", head_dim=16), folder], tmp_path / "out")
    biased = checkpoint("adapter", lora_bias=True)
    with pytest.raises(InputError, match="adds a bias"):
        operate("adapter", "apply", [checkpoint("llama"), biased], tmp_path / "out")
    with pytest.raises(InputError, match="is no linear layer"):
        operate(
            "adapter", "apply", [checkpoint("llama", num_hidden_layers=2), folder], tmp_path / "out"
        )
    with pytest.raises(InputError, match="is a model among adapters"):
        operate("adapter", "apply", [folder, checkpoint("llama")], tmp_path / "out")


# Resize


def test_prefixes_of_a_resized_adapter_are_optimal(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = shelf(checkpoint)[2]
    operate("adapter", "resize", source, tmp_path / "all")
    assert distance(changes(source), changes(tmp_path / "all")) < 1e-5
    operate("adapter", "resize", source, tmp_path / "two", rank=2)
    stored = load_file(tmp_path / "all" / "adapter_model.safetensors")
    cut = load_file(tmp_path / "two" / "adapter_model.safetensors")
    for name, value in cut.items():
        whole = stored[name]
        prefix = whole[:2] if "lora_A" in name else whole[:, :2]
        torch.testing.assert_close(value, prefix, atol=1e-5, rtol=1e-4)
    for name, change in changes(source).items():
        lost = (change - changes(tmp_path / "two")[name]).norm()
        assert float(lost) == pytest.approx(
            float(torch.linalg.svdvals(change)[2:].norm()), rel=1e-3, abs=1e-5
        )


# Split


@pytest.mark.parametrize("ranks", [1, 3])
def test_experts_add_up_to_the_adapter(ranks: int, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, base = shelf(checkpoint)[2], checkpoint("llama")
    operate("adapter", "split", source, tmp_path / "out", ranks=ranks)
    members = json.loads((tmp_path / "out" / "shelf.json").read_text())["members"]
    assert len(members) == -(-4 // ranks)
    folders = [tmp_path / "out" / name for name in sorted(members)]
    for folder in folders:
        peft(base, folder)
    operate("merge", "cat", folders, tmp_path / "sum")
    assert distance(changes(source), changes(tmp_path / "sum")) < 1e-5


def test_damage_in_a_folder_of_a_shelf_is_found(checkpoint: Checkpoint, tmp_path: Path) -> None:
    operate("adapter", "split", checkpoint("adapter"), tmp_path / "out")
    assert verify(str(tmp_path / "out"), reference=None, device="cpu", progress=Silent())
    file = tmp_path / "out" / "expert_1" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(VerificationError, match="expert_1"):
        verify(str(tmp_path / "out"), reference=None, device="cpu", progress=Silent())


# Arrow


def test_an_arrow_mixture_is_made_by_peft(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from peft import ArrowConfig
    from peft.tuners.lora import create_arrow_model

    base, folders = checkpoint("llama"), shelf(checkpoint)
    operate("adapter", "to-moe", folders, tmp_path / "out", top_k=2)
    listing = json.loads((tmp_path / "out" / "shelf.json").read_text())
    assert listing["trained"] is False
    assert "top_k=2" in listing["call"]
    paths = [str(tmp_path / "out" / name) for name in listing["members"]]
    for folder, path in zip(folders, paths, strict=True):
        found, own = changes(Path(path)), changes(folder)
        for name, change in found.items():
            expected = own.get(name, torch.zeros_like(change))
            torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)
    config = ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=0)
    mixture: Any = create_arrow_model(
        base_model=stock(base), task_specific_adapter_paths=paths, arrow_config=config
    )
    with torch.no_grad():
        mixture(input_ids=token_ids(base))
    prototypes = load_file(tmp_path / "out" / "shared.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    ours = prototypes[f"prototypes.{name}"]
    layer = mixture.base_model.model.get_submodule(name).lora_arrow["arrow_router"]
    cosines = (ours * layer.prototypes.float()).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(3), atol=2e-2, rtol=0)


# X-LoRA


def test_an_untrained_x_lora_is_the_mean_of_its_experts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """PEFT loads the classifier from our tensors: with other numbers in them it computes something else."""
    from peft import PeftModel, XLoraConfig

    base, folders = checkpoint("llama"), shelf(checkpoint)
    out = tmp_path / "out"
    operate("adapter", "to-moe", folders, out, form="x-lora")
    listing = json.loads((out / "shelf.json").read_text())
    assert listing["trained"] is False
    assert verify(str(out), reference=None, device="cpu", progress=Silent())["verified"]

    def mixture() -> Any:
        config: Any = XLoraConfig.from_pretrained(str(out / listing["router_folder"]))
        assert config.hidden_size == 32
        config.adapters = {str(i): str(out / name) for i, name in enumerate(listing["members"])}
        model = stock(base)
        model.config.use_cache = False
        loader: Any = PeftModel
        return loader.from_pretrained(model, str(out / "router"), config=config).eval()

    ids = token_ids(base)
    model = mixture()
    with torch.no_grad():
        found = model(input_ids=ids).logits
    operate("merge", "cat", folders, tmp_path / "mean", weights=",".join([repr(1 / 3)] * 3))
    torch.testing.assert_close(found, adapted(base, tmp_path / "mean"), atol=1e-4, rtol=1e-4)
    assert model.generate(input_ids=ids[:1], max_new_tokens=2, do_sample=False).shape == (1, 26)
    file = out / "router" / "adapter_model.safetensors"
    stored = load_file(file)
    bias = "base_model.internal_xlora_classifier.layers.0.bias"
    # Nearly all weight on the first expert.
    save_file({**stored, bias: torch.tensor([40.0, 0, 0])}, file, metadata={"format": "pt"})
    with torch.no_grad():
        first = mixture()(input_ids=ids).logits
    torch.testing.assert_close(first, adapted(base, folders[0]), atol=1e-4, rtol=1e-4)


def test_the_width_of_hidden_states_may_have_to_be_told(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = [checkpoint("adapter", seed=s, targets=("mlp.down_proj",)) for s in (1, 2)]
    with pytest.raises(UsageError, match="cannot be told"):
        operate("adapter", "to-moe", folders, tmp_path / "out", form="x-lora")
    operate("adapter", "to-moe", folders, tmp_path / "out", form="x-lora", hidden_size=32)


@pytest.mark.parametrize(
    ("method", "sources", "options", "error", "message"),
    [
        ("to-moe", 1, {}, InputError, "two or more adapters"),
        ("to-moe", 2, {"top_k": 0}, UsageError, "--top-k 0"),
        ("to-moe", 2, {"temperature": 0.0}, UsageError, "--temperature"),
        ("to-moe", 2, {"hidden_size": 8}, UsageError, "--hidden-size"),
        ("split", 2, {}, InputError, "takes one adapter"),
        ("split", 1, {"ranks": 0}, UsageError, "--ranks 0"),
        ("resize", 2, {}, InputError, "takes one adapter"),
        ("resize", 1, {"rank": 2, "energy": 0.5}, UsageError, "exclude each other"),
    ],
)
def test_what_tools_refuse(
    method: str,
    sources: int,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    checkpoint: Checkpoint,
    tmp_path: Path,
) -> None:
    folders = [checkpoint("adapter", seed=seed) for seed in range(sources)]
    with pytest.raises(error, match=message):
        operate("adapter", method, folders, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
