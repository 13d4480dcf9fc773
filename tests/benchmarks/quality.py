"""Perplexity per domain after every method, on text that calibration did not see.

    python -m tests.benchmarks.quality experts a.txt b.txt … --experts 12 8
    python -m tests.benchmarks.quality compress a.txt b.txt … --model FOLDER --ratios 0.1 0.2 0.4

Each file is a domain. Its first nine tenths calibrate, a slice of its last tenth is measured. Prints a Markdown table.
Not run by pytest. ``experts``: every merging and pruning method of a mixture, as it is and with ``--reconstruct``;
a control drawn at random is the mean over three seeds. ``compress``: every method of compression in its default form
(in the dense one where the model allows no other), with the bytes of its weights; what a method refuses is said.
``--seen`` measures on what calibration saw, as tables without a held-out part do; what fits text looks better there.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from moesurg.surgery.architectures.model import Model
from moesurg.surgery.calibration.gram_folder import calibrate_grams
from moesurg.surgery.calibration.run import calibrate
from moesurg.surgery.errors import MoesurgError
from moesurg.surgery.methods import load, taking
from moesurg.surgery.progress import Silent
from tests.benchmarks.measure import ROOT, SEQ_LEN, head, operate, perplexities, row, split

SEEDS = (0, 1, 2)
VARIANTS: dict[str, dict[str, object]] = {
    "prune hope --mean all": {"mean": "all"},
    "prune weighted-ean --power 2": {"power": 2},
}
"""Options beside the defaults that are measured too."""
WAYS: dict[str, dict[str, object]] = {
    "plain": {},
    "reconstruct": {"reconstruct": True},
    "sequential": {"reconstruct": True, "sequential": True},
    "plain sequential": {"sequential": True},
    "budget": {"reconstruct": True, "budget": "global"},
    "plain budget": {"budget": "global"},
}
"""What a method that makes fewer experts can be asked for beside its own options."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    experts_parser(parts.add_parser("experts", help="merge and prune"))
    compress_parser(parts.add_parser("compress", help="compress"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        arguments.measure(arguments, Path(name))


def experts_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(measure=experts)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures" / "tiny-moe")
    parser.add_argument("--experts", nargs="+", type=int, default=[12, 8])
    parser.add_argument("--tokens", type=int, default=36864, help="for calibration")
    parser.add_argument("--sample", type=int, default=36864, help="inputs kept of each mixture")
    parser.add_argument("--eval-tokens", type=int, default=12000)
    parser.add_argument("--ridge", type=float, default=0.1)
    parser.add_argument("--methods", nargs="+", default=labels(), metavar="LABEL")
    parser.add_argument("--ways", nargs="+", default=["plain", "reconstruct"], choices=WAYS)


def labels() -> list[str]:
    """Every method that makes fewer experts, such as ``merge ream``, and the variants."""
    found = [
        f"{command} {name}"
        for command in ("merge", "prune")
        for name in taking(command, "models")
        if "experts" in fields_of(command, name)
    ]
    return sorted([*found, *VARIANTS])


def ways_of(fields: set[str], ways: list[str]) -> list[str]:
    """The ways that a method has; one that always solves has no plain one."""
    solved = [way for way in ways if "sweeps" in fields or "reconstruct" not in WAYS[way]]
    always = "sweeps" in fields and "reconstruct" not in fields
    return [way for way in solved if not always or "reconstruct" in WAYS[way]]


def fields_of(command: str, name: str) -> set[str]:
    """The options of a method."""
    return {field.name for field in dataclasses.fields(load(command, name).options)}


def experts(arguments: argparse.Namespace, folder: Path) -> None:
    """The table of methods that make fewer experts."""
    seen, held_out = split(arguments.texts, folder)
    statistics = folder / "statistics"
    calibrate(
        str(arguments.model),
        statistics,
        data=seen,
        tokens=arguments.tokens,
        seq_len=SEQ_LEN,
        mode="all-expert",
        inputs=arguments.sample,
        gram=False,
        trace=False,
        device="cpu",
        force=False,
        resume=False,
        progress=Silent(),
    )
    source = Model.open(arguments.model)
    base = perplexities(arguments.model, held_out, arguments.eval_tokens)
    head("experts", "method", "way", *base, "error before", "error after")
    row(str(source.experts), "source", "", *base.values(), "", "")
    for count in arguments.experts:
        for label in arguments.methods:
            command, name = label.split()[:2]
            fields = fields_of(command, name)
            for way in ways_of(fields, arguments.ways):
                options: dict[str, Any] = {
                    "experts": count,
                    "sample": arguments.sample,
                    "ridge": arguments.ridge,
                    **WAYS[way],
                }
                options = {key: value for key, value in options.items() if key in fields}
                options |= VARIANTS.get(label, {})
                given: dict[str, Any] = {"calibration": statistics}
                if load(command, name).info.data == "none" and way == "plain":
                    given = {}
                elif options.get("sequential"):
                    given = {"data": seen, "tokens": arguments.tokens}
                results, errors = [], []
                for seed in SEEDS if name == "random" else SEEDS[:1]:
                    output = folder / "output"
                    report = operate(
                        command,
                        name,
                        arguments.model,
                        output,
                        options,
                        seed=seed,
                        **given,
                    )
                    results.append(perplexities(output, held_out, arguments.eval_tokens))
                    errors.append(layer_errors(report))
                mean = [sum(r[key] for r in results) / len(results) for key in base]
                before, after = (sum(e[i] for e in errors) / len(errors) for i in (0, 1))
                shown = (f"{before:.3f}", f"{after:.3f}") if before else ("", "")
                row(str(count), label, way, *mean, *shown)


def compress_parser(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(measure=compress)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "fixtures" / "tiny-moe")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5])
    parser.add_argument("--tokens", type=int, default=36864, help="for calibration")
    parser.add_argument("--eval-tokens", type=int, default=12000)
    parser.add_argument(
        "--seen", action="store_true", help="measure on the calibration's own tokens instead"
    )
    every = taking("compress", "models")
    parser.add_argument("--methods", nargs="+", default=every, choices=every)


def compress(arguments: argparse.Namespace, folder: Path) -> None:
    """The table of methods that store linear layers with fewer numbers."""
    seen, held_out = split(arguments.texts, folder)
    measured, count = (
        (seen, arguments.tokens) if arguments.seen else (held_out, arguments.eval_tokens)
    )
    model, grams = Model.open(arguments.model), folder / "grams"
    wanted = {load("compress", name).info.data for name in arguments.methods}
    if "gram" in wanted:
        calibrate_grams(
            model,
            grams,
            data=seen,
            tokens=arguments.tokens,
            seq_len=SEQ_LEN,
            device="cpu",
            force=False,
            resume=False,
            progress=Silent(),
        )
    base = perplexities(arguments.model, measured, count)
    before = sum(info.nbytes for info in model.checkpoint.tensors.values())
    head("removed", "method", "form", "bytes", *base)
    row("", "source", "", f"{before:,}", *base.values())
    for ratio in arguments.ratios:
        for name in arguments.methods:
            info = load("compress", name).info
            given: dict[str, Any] = {}
            if info.data == "gram":
                given["calibration"] = grams
            elif info.data != "none":
                given.update(data=seen, tokens=arguments.tokens)
            usual = load("compress", name).options(ratio=ratio).form
            for form in (usual, "dense"):
                output = folder / "output"
                options = {"ratio": ratio, "form": form}
                try:
                    report = operate("compress", name, arguments.model, output, options, **given)
                except MoesurgError as error:
                    if form == "dense":
                        row(f"{ratio:.0%}", name, f"refused: {error.message}")
                    continue
                found = perplexities(output, measured, count)
                size = int(report["output"]["bytes"])
                row(f"{ratio:.0%}", name, form, f"{size:,}", *found.values())
                break


def layer_errors(report: dict[str, Any]) -> tuple[float, float]:
    """Relative error of the mixtures' output on the sampled inputs, mean of the layers, before and after solving."""
    units = report["units"].values()
    found = [unit["reconstruction"] for unit in units if "reconstruction" in unit]
    if not found:
        return 0.0, 0.0
    before = sum(layer["error_before"] for layer in found) / len(found)
    return before, sum(layer["error_after"] for layer in found) / len(found)


if __name__ == "__main__":
    main()
