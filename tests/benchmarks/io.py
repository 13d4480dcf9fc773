"""What the spine costs: upcycling against plain copies, and its memory at two depths.

    python tests/benchmarks/io.py [--layers 8 24] [--runs 3] [--folder DIR]

Random Llama checkpoints (hidden 1024, feed-forward 2816, vocabulary 32000, bfloat16) are upcycled to four experts.
Everything runs in one process that has imported its libraries, so that start-up counts nowhere; every figure of
a line was taken in the same minute, and ratios are of medians. Memory is RssAnon, sampled every millisecond: what
the process itself holds, without mapped files and page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moesurg.surgery.operation import Request, run
from moesurg.surgery.progress import Silent

HIDDEN, WIDTH, VOCAB, HEADS, EXPERTS = 1024, 2816, 32000, 16, 4


def build(folder: Path, layers: int, *, seed: int = 0) -> Path:
    """A random checkpoint; the values do not matter, the sizes do."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = draw(HIDDEN, HIDDEN)
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = draw(WIDTH, HIDDEN)
        tensors[f"{prefix}mlp.down_proj.weight"] = draw(HIDDEN, WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = draw(HIDDEN)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def anonymous() -> int:
    """Bytes of memory that belong to no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel does not report RssAnon")


@contextmanager
def peak() -> Iterator[list[int]]:
    """The largest growth of anonymous memory while inside."""
    before, found, stop = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.001):
            found[0] = max(found[0], anonymous() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def upcycle(source: Path, output: Path) -> None:
    options: dict[str, object] = {"experts": EXPERTS, "top_k": 2}
    run(Request("upcycle", "sparse", (str(source),), output, options), Silent())


def copy(source: Path, output: Path, *, durable: bool) -> None:
    """`cp -r`, and on request until the bytes are on the disk, as the upcycle's are."""
    output.mkdir()
    for file in source.iterdir():
        target = output / file.name
        os.system(f"cp {file} {target}")
        if durable:
            descriptor = os.open(target, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def rewrite(source: Path, output: Path) -> None:
    """Read and write every tensor through safetensors."""
    output.mkdir(exist_ok=True)
    for file in source.glob("*.safetensors"):
        save_file(load_file(file), output / file.name, metadata={"format": "pt"})


def median_of(action: Callable[[], None], runs: int, *, fresh: Path) -> float:
    """Seconds of an action that makes the folder ``fresh``; removing it counts nowhere."""
    seconds = []
    for _ in range(runs):
        shutil.rmtree(fresh, ignore_errors=True)
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    print(
        "layers  output MB  upcycle s  cp s  ratio  cp+fsync s  ratio  safetensors s  ratio  peak MB"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for layers in arguments.layers:
            row(Path(name), layers, arguments.runs)
    largest = VOCAB * HIDDEN * 2
    print(f"allowed peak: 400 MB + two largest tensors = {400 + 2 * largest / 1e6:.0f} MB")


def row(folder: Path, layers: int, runs: int) -> None:
    """Measure one depth; the first, unmeasured upcycle warms imports and page cache."""
    source, output = build(folder / f"source-{layers}", layers), folder / "output"
    copied = folder / "copy"
    upcycle(source, output)
    shutil.rmtree(output)
    with peak() as memory:
        upcycle(source, output)
    took = median_of(lambda: upcycle(source, output), runs, fresh=output)
    plain = median_of(lambda: copy(output, copied, durable=False), runs, fresh=copied)
    durable = median_of(lambda: copy(output, copied, durable=True), runs, fresh=copied)
    library = median_of(lambda: rewrite(output, copied), runs, fresh=copied)
    size = sum(file.stat().st_size for file in output.iterdir()) / 1e6
    print(
        f"{layers:6d} {size:10.0f} {took:10.2f} {plain:5.2f} {took / plain:6.2f} {durable:11.2f} "
        f"{took / durable:6.2f} {library:14.2f} {took / library:6.2f} {memory[0] / 1e6:8.0f}"
    )
    for leftover in (source, output, copied):
        shutil.rmtree(leftover)


if __name__ == "__main__":
    main()
