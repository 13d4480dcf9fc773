"""Perplexity of a mixture on held-out text after every merging method, plain and with --reconstruct.

python -m tests.benchmarks.merge_quality fixtures/tiny-moe --data calibration/*.txt --held held-out/*.txt --experts 12 8

Texts for calibration and evaluation must be different files with nothing in common; this is the caller's to see to.
Calibrates once into a temporary folder, merges there, and prints a Markdown table. ``error`` is the relative error of
the routed output on the sampled inputs, averaged over layers, before and after reconstruction. Not run by pytest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from moesurg.surgery.calibration.run import calibrate
from moesurg.surgery.evaluate import evaluate_sources
from moesurg.surgery.methods import load, names
from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="calibration text")
    parser.add_argument("--held", type=Path, nargs="+", required=True, help="text to measure on")
    parser.add_argument("--experts", type=int, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=_reconstructing())
    parser.add_argument("--option", action="append", default=[], metavar="FIELD=JSON")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sample", type=int, default=32768)
    parser.add_argument("--held-tokens", type=int, default=12288)
    parser.add_argument("--seq-len", type=int, default=512)
    arguments = parser.parse_args()
    options = {
        key: json.loads(value)
        for key, _, value in (item.partition("=") for item in arguments.option)
    }
    with tempfile.TemporaryDirectory() as scratch:
        statistics = Path(scratch) / "statistics"
        found = calibrate(
            str(arguments.model),
            statistics,
            data=arguments.data,
            tokens=arguments.tokens,
            seq_len=arguments.seq_len,
            mode="all-expert",
            inputs=arguments.sample,
            gram=False,
            trace=False,
            device="cpu",
            force=False,
            resume=False,
            progress=Silent(),
        )
        print(
            f"calibrated on {found['tokens']} tokens, {arguments.sample} sampled inputs {options}"
        )
        print(f"unchanged: perplexity {_perplexity(arguments, arguments.model):.2f}\n")
        print("| experts | method | plain | reconstructed | error before | error after |")
        print("|---|---|---|---|---|---|", flush=True)
        for count in arguments.experts:
            for method in arguments.methods:
                _row(arguments, statistics, Path(scratch), count, method, options)


def _reconstructing() -> list[str]:
    return [
        name
        for name in names("merge")
        if "reconstruct"
        in {field.name for field in dataclasses.fields(load("merge", name).options)}
    ]


def _row(
    arguments: argparse.Namespace,
    statistics: Path,
    scratch: Path,
    count: int,
    method: str,
    options: dict[str, Any],
) -> None:
    found, errors = [], (0.0, 0.0)
    for reconstruct in (False, True):
        output = scratch / f"{method}-{count}-{reconstruct}"
        values = {"experts": count, "reconstruct": reconstruct, "sample": arguments.sample}
        request = Request(
            "merge",
            method,
            (str(arguments.model),),
            output,
            values | options,
            calibration=statistics,
        )
        run(request, Silent())
        found.append(_perplexity(arguments, output))
        if reconstruct:
            errors = _errors(output)
    print(
        f"| {count} | {method} | {found[0]:.2f} | {found[1]:.2f} | {errors[0]:.3f} | {errors[1]:.3f} |",
        flush=True,
    )


def _errors(output: Path) -> tuple[float, float]:
    units = json.loads((output / "report.json").read_text())["units"].values()
    layers = [unit["reconstruction"] for unit in units if "reconstruction" in unit]
    before = sum(layer["error_before"] for layer in layers) / len(layers)
    return before, sum(layer["error_after"] for layer in layers) / len(layers)


def _perplexity(arguments: argparse.Namespace, model: Path) -> float:
    found = evaluate_sources(
        str(model),
        reference=None,
        data=arguments.held,
        tokens=arguments.held_tokens,
        seq_len=arguments.seq_len,
        device="cpu",
        progress=Silent(),
    )
    return float(found["overall"]["perplexity"])


if __name__ == "__main__":
    main()
