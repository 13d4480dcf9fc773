"""What merging models costs against the least it could: reading the sources and writing the output once.

    python -m tests.benchmarks.models [--models 4] [--layers 10] [--dtype bfloat16] [--methods linear ties] [--runs 3]
        [--mergekit PYTHON]

Random Llama checkpoints (hidden 1024, feed-forward 2816, vocabulary 32000; 10 layers are 161 million parameters).
The floor reads every source in pieces of 4 MB and writes one output that reaches the disk; it computes nothing,
neither a merge nor the SHA-256 of every input and output file that a run records, whose own time is printed beside
it. Everything is timed in one process that has imported its libraries, on one thread; ratios are of medians. Memory
is what a fresh process holds itself (RssAnon) beyond its imports, sampled every millisecond; processor seconds, which
other work on the machine changes less, are means. With the interpreter of an environment that has
mergekit, the same merges by it stand beside ours: linear, ties, dare and della.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.benchmarks.io import build, median_of, peak
from tests.benchmarks.mergekit import measured, merge_config

PIECE = 4 << 20


def floor(sources: list[Path], output: Path) -> None:
    """Read everything, write the size of one model and wait for the disk."""
    output.mkdir()
    buffer = bytearray(PIECE)
    for source in sources:
        with (source / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    left = (sources[0] / "model.safetensors").stat().st_size
    with (output / "model.safetensors").open("wb", buffering=0) as file:
        while left:
            left -= file.write(memoryview(buffer)[: min(PIECE, left)])
        os.fsync(file.fileno())


def digests(sources: list[Path]) -> None:
    """SHA-256 of the sources and of one output."""
    for source in [*sources, sources[0]]:
        with (source / "model.safetensors").open("rb") as file:
            hashlib.file_digest(file, "sha256")


def merge(method: str, sources: list[Path], output: Path) -> None:
    run(Request("merge", method, tuple(map(str, sources)), output), Silent())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", type=Path, default=None, help="interpreter that has mergekit")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--measure", nargs="+", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure is not None:
        method, output, *given = arguments.measure
        with peak() as memory:
            merge(method, list(map(Path, given)), Path(output))
        print(memory[0])
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        sources = [
            build(folder / str(seed), arguments.layers, seed=seed)
            for seed in range(arguments.models)
        ]
        if arguments.dtype == "float32":
            for source in sources:
                file = source / "model.safetensors"
                wide = {key: value.float() for key, value in load_file(file).items()}
                save_file(wide, file, metadata={"format": "pt"})
        output = folder / "output"
        least = median_of(lambda: floor(sources, output), arguments.runs, fresh=output)
        started = time.perf_counter()
        digests(sources)
        hashing = time.perf_counter() - started
        size = (sources[0] / "model.safetensors").stat().st_size / 1e6
        print(
            f"{arguments.models} models of {size:.0f} MB ({arguments.dtype}): floor {least:.2f} s, "
            f"SHA-256 of all files {hashing:.2f} s"
        )
        other = "  mergekit s    CPU s  MB" if arguments.mergekit else ""
        print(f"method            seconds    CPU s  times the floor  peak MB{other}")
        for method in arguments.methods:
            shutil.rmtree(output, ignore_errors=True)
            memory = held(method, sources, output)

            def again(method: str = method) -> None:
                merge(method, sources, output)

            used = time.process_time()
            took = median_of(again, arguments.runs, fresh=output)
            used = (time.process_time() - used) / arguments.runs
            line = f"{method:16s} {took:8.2f} {used:8.2f} {took / least:16.2f} {memory / 1e6:8.0f}"
            if arguments.mergekit:
                seconds, used, most = theirs(arguments, method, sources, output)
                line += f" {seconds:11.2f} {used:8.2f} {most / 1e6:3.0f}"
            print(line, flush=True)


def held(method: str, sources: list[Path], output: Path) -> int:
    """Bytes by which a process of its own grows in a merge."""
    command = [sys.executable, "-m", "tests.benchmarks.models", "--measure", method, str(output)]
    done = subprocess.run(
        [*command, *map(str, sources)], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def theirs(
    arguments: argparse.Namespace, method: str, sources: list[Path], output: Path
) -> tuple[float, float, int]:
    """Median seconds, median processor seconds and largest memory of mergekit's merge."""
    config = merge_config(method, sources, arguments.dtype)
    found = []
    for _ in range(arguments.runs):
        shutil.rmtree(output, ignore_errors=True)
        given = {"config": config, "output": str(output)}
        found.append(measured(arguments.mergekit, "merge", given))
    seconds, used, most = zip(*found, strict=True)
    return statistics.median(seconds), statistics.median(used), max(most)


if __name__ == "__main__":
    main()
