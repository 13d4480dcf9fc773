"""What the quality benchmarks share: text cut in two, an operation, perplexity per domain, rows of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesurg.surgery.calibration.corpus import read_corpus
from moesurg.surgery.calibration.sequences import tokenise
from moesurg.surgery.checkpoint.reader import TensorReader
from moesurg.surgery.evaluate import evaluate, open_either
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 256


def split(files: Sequence[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """The first nine tenths of each file, for calibration, and the last, to measure on."""
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
    model = open_either(folder)
    sequences = tokenise(read_corpus(text), folder, tokens=tokens, seq_len=SEQ_LEN)
    with TensorReader(model.checkpoint) as reader:
        found: Any = evaluate(model, reader, sequences)
    domains = {name: tally["perplexity"] for name, tally in found["domains"].items()}
    return {"all": found["overall"]["perplexity"], **domains}


def operate(
    command: str,
    method: str,
    source: Path,
    output: Path,
    options: Mapping[str, object],
    *,
    seed: int = 0,
    calibration: Path | None = None,
    data: Sequence[Path] = (),
    tokens: int = 65536,
) -> dict[str, Any]:
    """Run a method and return its report."""
    request = Request(
        command,
        method,
        (str(source),),
        output,
        dict(options),
        seed=seed,
        calibration=calibration,
        data=tuple(data),
        tokens=tokens,
        seq_len=SEQ_LEN,
        force=True,
    )
    run(request, Silent())
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def head(*columns: str) -> None:
    """The first two lines of a Markdown table."""
    row(*columns)
    print("|---" * len(columns) + "|", flush=True)


def row(*cells: str | float) -> None:
    """A line of it; numbers with two digits after the point."""
    texts = [f"{cell:.2f}" if isinstance(cell, float) else cell for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)
