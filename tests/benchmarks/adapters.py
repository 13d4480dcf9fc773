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
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fixtures.train_adapters import perplexity
from moesurg.surgery.methods import methods
from tests.benchmarks.adapters_cost import cost, extraction, measure, merge
from tests.oracle.helpers import peft, stock

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "fixtures" / "adapters" / name for name in ("bible", "german", "python")]
LENGTH = 128
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
            print(json.dumps(measure(side, method, arguments, Path(name))))
        elif arguments.cost:
            cost(arguments, Path(name))
            if arguments.mergekit and (arguments.methods is None or "extract" in arguments.methods):
                extraction(arguments, Path(name))
        else:
            _quality(arguments, Path(name))


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
            merged = merge(method, sources, scratch / f"merged-{index}", chosen)
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
    pack = merge("rmm", sources, scratch / "pack", options)
    ids = next(iter(held.values()))[:2]
    for source in sources:
        taken = merge(
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


if __name__ == "__main__":
    main()
