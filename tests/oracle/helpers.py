"""Whole models in memory, as stock transformers sees them, and runs of the library on them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.calibration.run import calibrate
from moesurg.surgery.checkpoint.formats import format_of
from moesurg.surgery.checkpoint.header import TensorInfo, read_header, read_json
from moesurg.surgery.checkpoint.reader import open_checkpoint
from moesurg.surgery.methods.base import DataNeed
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent

PAIRS = [
    ("llama", "mixtral"),
    ("mistral", "mixtral"),
    ("qwen2", "qwen2_moe"),
    ("qwen3", "qwen3_moe"),
]
"""Dense families and the mixtures that hold them."""
TEXTS = {
    "code": "def add(first, second):\n    return first + second\n" * 30,
    "prose": "The river ran slowly past the old mill and on towards the sea. " * 30,
    "numbers": "12 + 30 = 42; 17 * 3 = 51; 99 - 98 = 1; " * 30,
}
"""Texts of three domains, by name."""


def stock(folder: Path) -> Any:
    """The model in float32, loaded without a missing or unexpected key."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def custom(folder: Path) -> Any:
    """A custom output in float32, loaded by its own model code without a missing or unexpected key."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model, info = loader.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=True,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def peft(base: Path, folder: Path) -> Any:
    """A model in float32 with an adapter that PEFT loaded without a missing or unexpected key."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = str(base)
    with warnings.catch_warnings():
        # A bias is merged by us, whatever PEFT's own merging makes of a base without one.
        warnings.filterwarnings("ignore", message=".lora_bias=True. was passed")
        adapted: Any = get_peft_model(stock(base), config)
    found = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    assert not found.unexpected_keys
    assert not [key for key in found.missing_keys if "lora_" in key or "modules_to_save" in key]
    return adapted.float().eval()


def token_ids(folder: Path, length: int = 24, rows: int = 3) -> torch.Tensor:
    from moesurg.surgery.checkpoint.header import read_json

    vocab = int(str(read_json(folder / "config.json")["vocab_size"]))
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(7))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = stock(folder)(input_ids=ids).logits
    return found


def custom_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of an output with model code."""
    with torch.no_grad():
        found: torch.Tensor = custom(folder)(input_ids=ids).logits
    return found


def assert_generates(model: Any, ids: torch.Tensor) -> None:
    """The cache gives what is computed without one."""
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def drift(first: Path, second: Path) -> float:
    """Largest difference of logits on random tokens."""
    ids = token_ids(first)
    return float((logits(first, ids) - logits(second, ids)).abs().max())


def operate(
    command: str, method: str, source: Path | Sequence[Path], output: Path, **arguments: Any
) -> dict[str, Any]:
    """Run an operation; options of the method and fields of the request alike by keyword."""
    sources = [source] if isinstance(source, Path) else source
    fields = {name: arguments.pop(name) for name in list(arguments) if name in _FIELDS}
    fields.setdefault("tokens", 600)
    fields.setdefault("seq_len", 64)
    request = Request(command, method, tuple(map(str, sources)), output, arguments, **fields)
    return run(request, Silent())


_FIELDS = set(Request.__dataclass_fields__) - {"command", "method", "sources", "output", "options"}


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """What lies in the files of an output, by the names in its plan."""
    form = format_of(folder)
    if form.member is None:
        return dict(open_checkpoint(folder, form).tensors)
    found: dict[str, TensorInfo] = {}
    for member in read_json(folder / form.config)["members"]:  # type: ignore[attr-defined]
        inner = open_checkpoint(folder / member, form.member).tensors
        found |= {f"{member}/{name}": info for name, info in inner.items()}
    if (folder / "shared.safetensors").exists():
        found |= read_header(folder / "shared.safetensors")
    return found


def report_of(folder: Path) -> Any:
    """What an output tells of itself."""
    return json.loads((folder / "report.json").read_text())


def decisions(folder: Path) -> Any:
    """An output's decisions, by layer."""
    return report_of(folder)["decisions"]


def units(folder: Path) -> Any:
    """What an output's units measured, by their names."""
    return report_of(folder)["units"]


def calibrated(
    source: Path,
    output: Path,
    *,
    mode: DataNeed = "routed",
    tokens: int = 600,
    seq_len: int = 64,
    inputs: int = 0,
) -> Path:
    """A folder of statistics of the built-in text."""
    calibrate(
        str(source),
        output,
        data=(),
        tokens=tokens,
        seq_len=seq_len,
        mode=mode,
        inputs=inputs,
        gram=False,
        trace=False,
        device="cpu",
        force=False,
        resume=False,
        progress=Silent(),
    )
    return output


def grams_of(source: Path) -> Path:
    """A folder of Gram matrices of a model's inputs, made once beside it."""
    from moesurg.surgery.architectures.model import Model
    from moesurg.surgery.calibration.gram_folder import calibrate_grams

    folder = source.parent / "grams"
    if not folder.exists():
        calibrate_grams(
            Model.open(source),
            folder,
            data=(),
            tokens=600,
            seq_len=64,
            device="cpu",
            force=False,
            resume=False,
            progress=Silent(),
        )
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def rewrite(source: Path, target: Path, change: dict[str, torch.Tensor]) -> Path:
    """A copy of a folder of one shard with some tensors changed."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    merged = {**tensors(source), **change}
    save_file(merged, target / "model.safetensors", metadata={"format": "pt"})
    return target
