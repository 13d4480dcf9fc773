"""Time and memory of merging and extracting adapters beside PEFT's and mergekit's: the ``--cost`` of `adapters.py`."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.benchmarks.io import peak
from tests.benchmarks.mergekit import measured

ROOT = Path(__file__).resolve().parents[2]
COST = ("cat", "svd", "ties", "dare")
"""Methods that PEFT has too; of the last two its forms on whole matrices, which end in an SVD as ours do."""
THIN = {"svd_rank": 16, "svd_full_matrices": False}
THEIRS: dict[str, dict[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd", **THIN},
    "ties": {"combination_type": "ties_svd", "density": 0.2, **THIN},
    "dare": {"combination_type": "dare_linear_svd", "density": 0.5, **THIN},
}


def merge(
    method: str,
    sources: Sequence[Path],
    output: Path,
    options: dict[str, Any],
    command: str = "merge",
) -> Path:
    run(Request(command, method, tuple(map(str, sources)), output, options), Silent())
    return output


def cost(arguments: argparse.Namespace, scratch: Path) -> None:
    print(f"{arguments.copies} adapters of rank {arguments.rank} on every linear layer, one thread")
    print(
        "| method | ours s | CPU s | PEFT s: merging | adapters | base | CPU s of all | ours MB | PEFT MB |"
    )
    print("|---" * 9 + "|", flush=True)
    for method in COST:
        if arguments.methods is not None and method not in arguments.methods:
            continue
        ours, theirs = (
            [_child(side, method, arguments) for _ in range(arguments.runs)]
            for side in ("ours", "peft")
        )

        def middle(found: list[dict[str, float]], key: str) -> float:
            return statistics.median(one[key] for one in found)

        print(
            f"| {method} | {middle(ours, 'seconds'):.2f} | {middle(ours, 'used'):.2f} | "
            f"{middle(theirs, 'seconds'):.2f} | {middle(theirs, 'adapters'):.2f} | "
            f"{middle(theirs, 'base'):.2f} | "
            f"{middle(theirs, 'used'):.2f} | {middle(ours, 'bytes') / 1e6:.0f} | "
            f"{middle(theirs, 'bytes') / 1e6:.0f} |",
            flush=True,
        )


def extraction(arguments: argparse.Namespace, scratch: Path) -> None:
    """Rank-16 adapters of a fine-tune whose changes have rank 64: ours, ours randomised, mergekit's."""
    source = _random(arguments.base, scratch / "source", 64, 0)
    tuned = scratch / "tuned"
    options = {"weights": "0.001"}
    merge("apply", [arguments.base, source], tuned, options, command="adapter")
    print("| extraction at rank 16 | seconds | CPU s | MB |")
    print("|---|---|---|---|", flush=True)
    for label, extra in (("adapter extract", {}), ("adapter extract --fast", {"fast": True})):
        found = []
        for index in range(arguments.runs):
            out = scratch / f"{label}-{index}"
            with peak() as grown:
                started, used = time.perf_counter(), time.process_time()
                merge("extract", [arguments.base, tuned], out, extra, command="adapter")
                seconds, used = time.perf_counter() - started, time.process_time() - used
            found.append((seconds, used, grown[0]))
        _row(label, found)
    found = []
    for index in range(arguments.runs):
        given = [
            "--model",
            str(tuned),
            "--base-model",
            str(arguments.base.resolve()),
            "--max-rank",
            "16",
        ]
        given += ["--out-path", str(scratch / f"theirs-{index}")]
        found.append(measured(arguments.mergekit, "extract", {"arguments": given}))
    _row("mergekit-extract-lora", found)


def _row(label: str, found: Sequence[tuple[float, float, int]]) -> None:
    seconds, used, most = zip(*found, strict=True)
    middle = f"{statistics.median(seconds):.2f} | {statistics.median(used):.2f}"
    print(f"| {label} | {middle} | {max(most) / 1e6:.0f} |", flush=True)


def _child(side: str, method: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.adapters", str(arguments.base)]
    command += ["--measure", side, method, "--copies", str(arguments.copies)]
    command += ["--rank", str(arguments.rank)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    side: str, method: str, arguments: argparse.Namespace, scratch: Path
) -> dict[str, float]:
    """One merge in this process: ``seconds``, ``used``, ``bytes``; for PEFT of loading ``base`` and ``adapters``."""
    import peft as library
    from transformers import AutoModelForCausalLM

    folders = [
        _random(arguments.base, scratch / f"adapter-{index}", arguments.rank, index)
        for index in range(arguments.copies)
    ]
    if side == "ours":
        options = {} if method == "cat" else {"rank": 16}
        with peak() as grown:
            started, used = time.perf_counter(), time.process_time()
            merge(method, folders, scratch / "out", options)
            seconds, used = time.perf_counter() - started, time.process_time() - used
        return {"seconds": seconds, "used": used, "bytes": grown[0]}
    loader: Any = AutoModelForCausalLM
    with peak() as grown:
        started, used = time.perf_counter(), time.process_time()
        base = loader.from_pretrained(arguments.base, dtype=torch.bfloat16, local_files_only=True)
        based = time.perf_counter()
        names = [f"a{index}" for index in range(len(folders))]
        model: Any = library.PeftModel.from_pretrained(base, str(folders[0]), adapter_name="a0")
        for name, folder in zip(names[1:], folders[1:], strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        loaded = time.perf_counter()
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", **THEIRS[method])
        model.save_pretrained(
            str(scratch / "out"), selected_adapters=["merged"], save_embedding_layers=False
        )
        seconds = time.perf_counter() - loaded
        used = time.process_time() - used
    parts = {"base": based - started, "adapters": loaded - based, "seconds": seconds}
    return {**parts, "used": used, "bytes": grown[0]}


def _random(base: Path, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter (float32) of all linear layers of a Llama."""
    config = json.loads((base / "config.json").read_text())
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            stored[f"{path}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            stored[f"{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    document = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[1] for name in shapes),
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder
