"""Laws that every way of merging adapters shares: one adapter is itself, copies too, order and damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.errors import InputError
from tests.oracle.helpers import operate, peft, token_ids
from tests.oracle.test_adapters import changes, distance, shelf

Checkpoint = Callable[..., Path]
HEAD = "base_model.model.lm_head.weight"
ITSELF: dict[str, dict[str, Any]] = {
    "cat": {},
    "svd": {},
    "core": {"rule": "tsv"},
    "knots": {"rule": "ties", "density": 1.0},
    "tsv-m": {},
    "ties": {"density": 1.0},
    "dare": {"density": 1.0},
    "della": {"density": 1.0},
    "task-arithmetic": {},
    "ctm": {"rule": "ties", "density": 1.0},
    "lora-lego": {},
    "ffa": {},
}
"""Methods, with options, that give one adapter back, and its copies at weights that add up to one."""
SPLIT = {
    "lora-lego": {"rank": 3, "gauge": "svd", "weights": "1,1"},
    "tsv-m": {"weights": "1,1"},
    "core": {"rule": "tsv", "weights": "1,1"},
}
"""Options for two copies where ranks or directions that copies share are joined: at weight one each they are one."""


def special(folder: Path) -> Path:
    """An adapter of a linear layer, an embedding and a convolution, with a head saved in full."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    prefix = "base_model.model.model."
    stored = {
        f"{prefix}q_proj.lora_A.weight": draw(3, 8),
        f"{prefix}q_proj.lora_B.weight": draw(6, 3),
        f"{prefix}embed_tokens.lora_embedding_A": draw(3, 11),
        f"{prefix}embed_tokens.lora_embedding_B": draw(8, 3),
        f"{prefix}conv.lora_A.weight": draw(3, 4, 2, 5),
        f"{prefix}conv.lora_B.weight": draw(7, 3, 1, 1),
        HEAD: draw(11, 8),
    }
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    document = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["q_proj", "embed_tokens", "conv"],
        "modules_to_save": ["lm_head"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def flat_changes(folder: Path) -> dict[str, torch.Tensor]:
    """Every product in float64, of embeddings and kernels flattened, straight from the files."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, down in stored.items():
        if "_A" in name:
            rank = down.shape[0]
            alpha = config["lora_alpha"] if not config.get("alpha_pattern") else float("nan")
            scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
            up = stored[name.replace("_A", "_B")].double().reshape(-1, rank)
            found[name] = scale * up @ down.double().reshape(rank, -1)
    return found


@pytest.mark.parametrize("method", sorted(ITSELF))
def test_one_adapter_of_every_kind_is_itself(method: str, tmp_path: Path) -> None:
    source = special(tmp_path / "in")
    operate("merge", method, source, tmp_path / "out", **ITSELF[method])
    assert distance(flat_changes(source), flat_changes(tmp_path / "out")) < 2e-5
    mine, other = (load_file(f / "adapter_model.safetensors") for f in (source, tmp_path / "out"))
    assert {name: value.shape for name, value in mine.items() if "_A" not in name} == {
        name: value.shape for name, value in other.items() if "_A" not in name
    }
    assert torch.equal(mine[HEAD], other[HEAD])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    assert config["r"] == config["lora_alpha"] == 3


def test_peft_loads_embeddings_and_heads_alike(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """PEFT's own merger drops a head that one adapter trained."""
    base = checkpoint("llama")
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    extra = {
        HEAD: torch.randn(vocabulary, 32, generator=generator),
        f"{embedding}A": torch.randn(3, vocabulary, generator=generator),
        f"{embedding}B": torch.randn(32, 3, generator=generator),
    }
    source = checkpoint(
        "adapter",
        extra=extra,
        modules_to_save=["lm_head"],
        target_modules=["q_proj", "v_proj", "embed_tokens"],
    )
    operate("merge", "svd", source, tmp_path / "out")
    ids = token_ids(base)
    with torch.no_grad():
        first, second = (peft(base, f)(input_ids=ids).logits for f in (source, tmp_path / "out"))
    assert (first - second).abs().max() < 1e-4 * first.abs().max()


@pytest.mark.parametrize("alpha", [5, -5])
@pytest.mark.parametrize("method", sorted(ITSELF))
def test_copies_are_the_adapter(
    method: str, alpha: int, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("adapter", rank=3, alpha=alpha)
    options = {"weights": "0.5,0.5", **ITSELF[method], **SPLIT.get(method, {})}
    operate("merge", method, [source, source], tmp_path / "out", **options)
    assert distance(changes(source), changes(tmp_path / "out")) < 1e-4


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cat", {}),
        ("svd", {"rank": 3}),
        ("core", {"rule": "tsv"}),
        ("tsv-m", {}),
        ("iso-c", {}),
        ("ctm", {"rank": 3}),
        ("ties", {}),
        ("task-arithmetic", {}),
        ("rtsvm", {}),
    ],
)
def test_order_does_not_matter(
    method: str, options: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folders = shelf(checkpoint)
    operate("merge", method, folders, tmp_path / "one", weights="0.5,2,1", **options)
    operate("merge", method, folders[::-1], tmp_path / "two", weights="1,2,0.5", **options)
    assert distance(changes(tmp_path / "one"), changes(tmp_path / "two")) < 2e-4


@pytest.mark.parametrize("method", ["cat", "ties", "lora-lego"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(
    method: str, value: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, broken = checkpoint("adapter"), tmp_path / "broken"
    broken.mkdir()
    stored = load_file(source / "adapter_model.safetensors")
    name = sorted(stored)[3]
    stored[name][0, 0] = value
    save_file(stored, broken / "adapter_model.safetensors")
    (broken / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        operate("merge", method, [source, broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()
