"""What growing a mixture costs: time and peak memory against `cp` of the output, from one source and from four.

    python -m tests.benchmarks.upcycle [--layers 4 8 16] [--runs 3] [--folder DIR]

Random Llama checkpoints as in `io.py`: ``sparse`` copies one, ``btx`` takes experts from four and averages the rest
in float64, ``bam`` also sets their attentions side by side. Memory should depend neither on the depth nor on the
number of sources: it is anonymous memory above that of the process before its first run, and what an earlier run left
to the allocator counts. Everything runs in one process that has imported its libraries; ratios are of medians taken
in the same minute.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent
from tests.benchmarks.io import EXPERTS, anonymous, build, copy, median_of, peak

METHODS = {"sparse": 1, "btx": EXPERTS, "bam": EXPERTS}
"""Methods and the number of their sources."""


def upcycle(method: str, sources: Sequence[Path], output: Path) -> None:
    options: dict[str, object] = {} if method == "bam" else {"top_k": 2}
    if method == "sparse":
        options["experts"] = EXPERTS
    run(Request("upcycle", method, tuple(map(str, sources)), output, options), Silent())


def row(folder: Path, method: str, layers: int, runs: int, before: int) -> None:
    """Measure one method at one depth; the first, unmeasured run warms imports and page cache."""
    sources = [folder / f"{method}-{index}" for index in range(METHODS[method])]
    for seed, source in enumerate(sources):
        # In a process of its own, so that what it leaves to the allocator is not held here.
        maker = get_context("spawn").Process(
            target=build, args=(source, layers), kwargs={"seed": seed}
        )
        maker.start()
        maker.join()
    output, copied = folder / "output", folder / "copy"
    upcycle(method, sources, output)
    shutil.rmtree(output)
    held = anonymous() - before
    with peak() as memory:
        upcycle(method, sources, output)
    took = median_of(lambda: upcycle(method, sources, output), runs, fresh=output)
    plain = median_of(lambda: copy(output, copied, durable=False), runs, fresh=copied)
    durable = median_of(lambda: copy(output, copied, durable=True), runs, fresh=copied)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(
        f"{method:8} {len(sources):7d} {layers:6d} {size:10.0f} {took:7.2f} {plain:5.2f} {took / plain:6.2f} "
        f"{durable:11.2f} {took / durable:6.2f} {(held + memory[0]) / 1e6:8.0f}",
        flush=True,
    )
    for leftover in (*sources, output, copied):
        shutil.rmtree(leftover)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    print(
        "method   sources layers  output MB  time s  cp s  ratio  cp+fsync s  ratio  peak MB",
        flush=True,
    )
    before = anonymous()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for method in METHODS:
            for layers in arguments.layers:
                row(Path(name), method, layers, arguments.runs, before)


if __name__ == "__main__":
    main()
