"""Perplexity of a mixture after every pruning method, on text that calibration did not see.

    python -m tests.benchmarks.prune_quality a.txt b.txt … --experts 12 8

Each file is a domain. Its first nine tenths calibrate, a slice of its last tenth is measured. Prints a Markdown
table; the random control is the mean over three seeds. Not run by pytest.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.corpus import read_corpus
from moesurg.surgery.calibration.run import calibrate
from moesurg.surgery.calibration.sequences import tokenise
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.evaluate import evaluate
from moesurg.surgery.methods import names
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
VARIANTS: dict[str, dict[str, object]] = {
    "hope --mean all": {"mean": "all"},
    "weighted-ean --power 2": {"power": 2},
}
"""Options beside the defaults that are measured too."""


def split(files: Sequence[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """The first nine tenths of each file, and the last."""
    parts: tuple[list[Path], list[Path]] = ([], [])
    for kind, found in zip(("seen", "held-out"), parts, strict=True):
        (folder / kind).mkdir()
        for file in files:
            text = file.read_text(encoding="utf-8")
            cut = len(text) * 9 // 10
            target = folder / kind / file.name
            target.write_text(text[:cut] if kind == "seen" else text[cut:], encoding="utf-8")
            found.append(target)
    return parts


def perplexities(folder: Path, text: Sequence[Path], tokens: int) -> dict[str, float]:
    """Of every domain and, under ``all``, of all together."""
    model = Model.open(folder)
    sequences = tokenise(read_corpus(text), folder, tokens=tokens, seq_len=256)
    with TensorReader(model.checkpoint) as reader:
        found: Any = evaluate(model, reader, sequences)
    domains = {name: tally["perplexity"] for name, tally in found["domains"].items()}
    return {"all": found["overall"]["perplexity"], **domains}


def pruned(
    source: Path, label: str, experts: int, statistics: Path, output: Path, seed: int
) -> None:
    method = label.partition(" ")[0]
    given = None if method in ("aimer", "random") else statistics
    run(
        Request(
            "prune",
            method,
            (str(source),),
            output,
            {"experts": experts, **VARIANTS.get(label, {})},
            seed=seed,
            calibration=given,
        ),
        Silent(),
    )


def row(label: str, values: Mapping[str, float]) -> None:
    cells = (label, *(f"{value:.2f}" for value in values.values()))
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures" / "tiny-moe")
    parser.add_argument("--experts", nargs="+", type=int, default=[12, 8])
    parser.add_argument("--tokens", type=int, default=24000, help="for calibration")
    parser.add_argument("--eval-tokens", type=int, default=12000)
    parser.add_argument("--samples", type=int, default=1024, help="inputs kept for naee")
    parser.add_argument("--methods", nargs="+", default=sorted([*names("prune"), *VARIANTS]))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seen, held_out = split(arguments.texts, folder)
        statistics = folder / "statistics"
        calibrate(
            str(arguments.model),
            statistics,
            data=seen,
            tokens=arguments.tokens,
            seq_len=256,
            mode="routed",
            inputs=arguments.samples,
            gram=False,
            trace=False,
            device="cpu",
            force=False,
            resume=False,
            progress=Silent(),
        )
        base = perplexities(arguments.model, held_out, arguments.eval_tokens)
        print("| experts kept | " + " | ".join(base) + " |")
        print("|---" * (len(base) + 1) + "|")
        row(f"{Model.open(arguments.model).experts} (source)", base)
        for experts in arguments.experts:
            for method in arguments.methods:
                results = []
                for seed in SEEDS if method == "random" else SEEDS[:1]:
                    output = folder / f"{method}-{experts}-{seed}".replace(" ", "")
                    pruned(arguments.model, method, experts, statistics, output, seed)
                    results.append(perplexities(output, held_out, arguments.eval_tokens))
                mean = {key: sum(r[key] for r in results) / len(results) for key in base}
                row(f"{experts} {method}", mean)


if __name__ == "__main__":
    main()
