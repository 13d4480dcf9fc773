"""Perplexity per domain of every way of merging adapters, and its time and memory beside PEFT's own merger.

    python -m tests.benchmarks.adapters SMOLLM2 --held TEXT... [--adapters DIR...] [--sequences 8] [--methods svd ...]
    python -m tests.benchmarks.adapters SMOLLM2 --cost [--copies 4] [--mergekit PYTHON]

The first prints a Markdown table: the base, every adapter alone, every merge of all of them, and each adapter taken
out of a pack (``merge rmm``) again, with the largest difference of its logits. Perplexities are of the last tenth of
each text, 128 tokens a sequence. Adapters are widened to float32 first, so that no cast plays a role.

The second compares with ``add_weighted_adapter``. Every measurement is a process of its own; seconds begin after the
imports, and memory is the largest growth of what belongs to no file from there on. Ours begins with the adapters'
files and ends with the merged one on the disk, digests and all. PEFT merges inside a model, so the seconds for loading
the adapters and the base stand beside those for merging and saving; its SVDs are thin ones (by default it asks for
full matrices, which takes longer). With the interpreter of an environment that has mergekit, its extraction of an
adapter from a fine-tune stands beside ours. Not run by pytest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fixtures.train_adapters import perplexity
from moesurg.surgery.methods import methods
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.benchmarks.io import peak
from tests.benchmarks.mergekit import measured
from tests.oracle.helpers import peft, stock

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "fixtures" / "adapters" / name for name in ("bible", "german", "python")]
LENGTH = 128
COST = ("cat", "svd", "ties", "dare")
"""Methods that PEFT has too; of the last two its forms on whole matrices, which end in an SVD as ours do."""
THIN = {"svd_rank": 16, "svd_full_matrices": False}
THEIRS: dict[str, dict[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd", **THIN},
    "ties": {"combination_type": "ties_svd", "density": 0.2, **THIN},
    "dare": {"combination_type": "dare_linear_svd", "density": 0.5, **THIN},
}
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("cat, mean", "cat", {"mean": True}),
    ("task-arithmetic, mean", "task-arithmetic", {"mean": True}),
    ("lora-lego, no output scale", "lora-lego", {"rescale_output": False}),
    ("core, sum", "core", {"rule": "sum"}),
    ("core, ties", "core", {"rule": "ties"}),
]
"""Further rows: label, method, options; ``mean`` stands for weights of one over the number of adapters."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("--held", type=Path, nargs="+", default=[], help="texts, a domain each")
    parser.add_argument("--adapters", type=Path, nargs="+", default=SHIPPED)
    parser.add_argument("--sequences", type=int, default=8, help="of every domain")
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--cost", action="store_true", help="compare time and memory with PEFT")
    parser.add_argument("--copies", type=int, default=4, help="adapters merged for --cost")
    parser.add_argument("--rank", type=int, default=16, help="of those adapters")
    parser.add_argument("--mergekit", type=Path, default=None, help="interpreter that has mergekit")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.measure is not None:
            side, method = arguments.measure
            print(json.dumps(_measured(side, method, arguments, Path(name))))
        elif arguments.cost:
            _cost(arguments, Path(name))
            if arguments.mergekit and (arguments.methods is None or "extract" in arguments.methods):
                _extraction(arguments, Path(name))
        else:
            _quality(arguments, Path(name))


def _merge(
    method: str,
    sources: Sequence[Path],
    output: Path,
    options: dict[str, Any],
    command: str = "merge",
) -> Path:
    run(Request(command, method, tuple(map(str, sources)), output, options), Silent())
    return output


# Quality


def _quality(arguments: argparse.Namespace, scratch: Path) -> None:
    sources = [_widened(folder, scratch / folder.name) for folder in arguments.adapters]
    held = _held(arguments)
    print("| adapter | " + " | ".join(held) + " |")
    print("|---" * (1 + len(held)) + "|", flush=True)

    base = stock(arguments.base)

    def row(label: str, folder: Path | None) -> None:
        found = _perplexities(base, folder, held.values())
        print(f"| {label} | " + " | ".join(f"{value:.2f}" for value in found) + " |", flush=True)

    row("none", None)
    for source in sources:
        row(source.name, source)
    names = [
        method.name
        for method in methods()
        if method.command == "merge"
        and method.info.takes == "adapters"
        and method.info.tier != "pack"
    ]
    entries = [(name, name, {}) for name in names] + VARIANTS
    for index, (label, method, options) in enumerate(entries):
        if arguments.methods is not None and method not in arguments.methods:
            continue
        chosen = dict(options)
        if chosen.pop("mean", False):
            chosen["weights"] = ",".join([repr(1 / len(sources))] * len(sources))
        try:
            merged = _merge(method, sources, scratch / f"merged-{index}", chosen)
        except Exception as error:  # a method that does not fit these adapters says so in its row
            print(f"| {label} | {error} |", flush=True)
            continue
        row(label, merged)
    _reverted(arguments, sources, held, scratch)


def _perplexities(base: Any, folder: Path | None, held: Iterable[torch.Tensor]) -> list[float]:
    """Of the base with an adapter, which is taken off again."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if folder is None:
        return [perplexity(base, ids) for ids in held]
    adapted: Any = get_peft_model(base, LoraConfig.from_pretrained(str(folder)))
    loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    if loaded.unexpected_keys or any("lora_" in key for key in loaded.missing_keys):
        raise SystemExit(f"{folder}: PEFT finds other names than the file holds")
    found = [perplexity(adapted, ids) for ids in held]
    adapted.unload()
    return found


def _reverted(
    arguments: argparse.Namespace,
    sources: Sequence[Path],
    held: dict[str, torch.Tensor],
    scratch: Path,
) -> None:
    """Logits of each adapter and of what a pack with a full basis gives back for it."""
    if arguments.methods is not None and "rmm" not in arguments.methods:
        return
    options = {"basis": len(sources) - 1, "form": "global", "pad": True, "allow_larger": True}
    pack = _merge("rmm", sources, scratch / "pack", options)
    ids = next(iter(held.values()))[:2]
    for source in sources:
        taken = _merge(
            "rmm", [pack], scratch / f"taken-{source.name}", {"task": source.name}, "revert"
        )
        with torch.no_grad():
            first, second = (
                peft(arguments.base, folder)(input_ids=ids).logits for folder in (source, taken)
            )
        difference = float((first - second).abs().max())
        print(
            f"{source.name} from the pack: largest difference of logits {difference:.1e}",
            flush=True,
        )


def _held(arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Sequences of the last tenth of each text, token ids [sequences, 128], by name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.base, local_files_only=True)
    found = {}
    for file in arguments.held:
        text = file.read_text(encoding="utf-8")
        start = len(text) * 9 // 10
        # A token is hardly ever longer than sixteen characters; the whole tenth would take minutes.
        part = text[start : start + 16 * LENGTH * arguments.sequences]
        ids = torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"])
        found[file.stem] = ids[: LENGTH * arguments.sequences].view(-1, LENGTH)
    return found


def _widened(source: Path, target: Path) -> Path:
    """The same adapter in float32."""
    target.mkdir()
    stored = load_file(source / "adapter_model.safetensors")
    wide = {name: value.float() for name, value in stored.items()}
    save_file(wide, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    return target


# Cost


def _cost(arguments: argparse.Namespace, scratch: Path) -> None:
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


def _extraction(arguments: argparse.Namespace, scratch: Path) -> None:
    """Rank-16 adapters of a fine-tune whose changes have rank 64: ours, ours randomised, mergekit's."""
    source = _random(arguments.base, scratch / "source", 64, 0)
    tuned = scratch / "tuned"
    options = {"weights": "0.001"}
    _merge("apply", [arguments.base, source], tuned, options, command="adapter")
    print("| extraction at rank 16 | seconds | CPU s | MB |")
    print("|---|---|---|---|", flush=True)
    for label, extra in (("adapter extract", {}), ("adapter extract --fast", {"fast": True})):
        found = []
        for index in range(arguments.runs):
            out = scratch / f"{label}-{index}"
            with peak() as grown:
                started, used = time.perf_counter(), time.process_time()
                _merge("extract", [arguments.base, tuned], out, extra, command="adapter")
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


def _measured(
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
            _merge(method, folders, scratch / "out", options)
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


if __name__ == "__main__":
    main()
