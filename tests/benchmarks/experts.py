"""Calibration, merging and pruning of one layer of a large mixture: seconds and memory, with the floors beside.

    python -m tests.benchmarks.experts [--tokens 2048] [--stages routed all m-smoe ...] [--folder DIR]

One decoder layer with the mixture of Qwen3-30B-A3B (128 experts of 2048 x 768, eight a token, bfloat16, random weights)
behind a vocabulary of bytes. Every stage is a command of its own; its memory is the sum of the resident sizes of all
its processes, sampled ten times a second. The floors are what cannot be avoided: the same command on the tiny mixture
of this repository, which is start-up (the imports of transformers alone take seconds); reading the layer once, from the
page cache, and digesting it, which every run does for its report; and its matrix products at the speed that one core
multiplies float32 matrices of such sizes at. Floors are compared in seconds of all cores together, which depend least
on what else the machine does; the seconds that passed stand beside.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from fixtures.byte_tokenizer import VOCAB_SIZE, byte_tokenizer

EXPERTS, HIDDEN, WIDTH, TOP_K, KEPT = 128, 2048, 768, 8, 64
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny-moe"
LIMIT = 6e9
"""Resident bytes that no stage may exceed."""

CALIBRATIONS = {"routed": ["--routed-only"], "all": []}
OPERATIONS = {
    "reap": ["prune", "--method", "reap"],
    "aimer": ["prune", "--method", "aimer"],
    "hc-smoe": ["merge", "--method", "hc-smoe"],
    "m-smoe": ["merge", "--method", "m-smoe"],
    "reconstruct": ["merge", "--method", "hc-smoe", "--reconstruct", "--sample", "1024"],
}


class Cost(NamedTuple):
    """What a stage took."""

    seconds: float
    cpu: float
    resident: int


def build(folder: Path) -> Path:
    """The checkpoint; values do not matter but for their spread."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    prefix = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": draw(VOCAB_SIZE, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN).bfloat16(),
        "lm_head.weight": draw(VOCAB_SIZE, HIDDEN),
        f"{prefix}mlp.gate.weight": draw(EXPERTS, HIDDEN),
    }
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(HIDDEN).bfloat16()
    for name in ("q_norm", "k_norm"):
        tensors[f"{prefix}self_attn.{name}.weight"] = torch.ones(HEAD_DIM).bfloat16()
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        tensors[f"{prefix}self_attn.{name}_proj.weight"] = draw(heads * HEAD_DIM, HIDDEN)
    tensors[f"{prefix}self_attn.o_proj.weight"] = draw(HIDDEN, HEADS * HEAD_DIM)
    for expert in range(EXPERTS):
        for name, shape in (
            ("gate", (WIDTH, HIDDEN)),
            ("up", (WIDTH, HIDDEN)),
            ("down", (HIDDEN, WIDTH)),
        ):
            tensors[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = draw(*shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 6144,
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(folder)
    return folder


def resident(process: int) -> int:
    """Resident bytes of a process and everything below it; 0 once it is gone."""
    total = 0
    for number in family(process):
        try:
            pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
        total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


def family(process: int) -> Iterator[int]:
    yield process
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        below = [child for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return
    for child in below:
        yield from family(int(child))


def run(*arguments: object) -> Cost:
    """One command, measured; its own words are shown when it fails."""
    started, largest = time.perf_counter(), 0
    words = [sys.executable, "-m", "moesurg.commands", *map(str, arguments), "--quiet", "--json"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)
        ended = 0
        while not ended:
            largest = max(largest, resident(process.pid))
            time.sleep(0.1)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode())
    return Cost(time.perf_counter() - started, used.ru_utime + used.ru_stime, largest)


def read_seconds(folder: Path) -> tuple[float, float]:
    """Reading the weights once, from the page cache; and digesting them while they are read."""
    view = memoryview(bytearray(4 << 20))
    found = []
    for digested in (False, False, True):
        state, started = hashlib.sha256(), time.process_time()
        with (folder / "model.safetensors").open("rb", buffering=0) as file:
            while length := file.readinto(view):
                if digested:
                    state.update(view[:length])
        found.append(time.process_time() - started)
    return found[1], found[2]


def flops_a_second() -> float:
    """Of one core, for float32 products of [256, D] inputs with an expert's matrix."""
    torch.set_num_threads(1)
    left, right = torch.randn(256, HIDDEN), torch.randn(HIDDEN, 2 * WIDTH)
    done, started = 0, time.process_time()
    while time.process_time() - started < 2.0:
        left @ right
        done += 1
    seconds = time.process_time() - started
    return done * 2 * 256 * HIDDEN * 2 * WIDTH / seconds


def products(stage: str, tokens: int) -> float:
    """Floating-point operations of a stage's matrix products that no other way of computing it avoids."""
    expert = 6.0 * HIDDEN * WIDTH
    if stage == "routed":
        return tokens * TOP_K * expert
    if stage == "all":
        outputs = 2.0 * EXPERTS * EXPERTS * HIDDEN  # inner products of all outputs of a token
        return tokens * (EXPERTS * expert + outputs)
    if stage == "m-smoe":
        return (EXPERTS - KEPT) * 6.0 * WIDTH * WIDTH * HIDDEN  # one cost matrix a pair
    if stage == "reconstruct":
        # The original's output, and with the new experts: hidden activations, F x F and D x F sums.
        rows = 1024 * TOP_K
        return rows * (2 * expert + 2.0 * WIDTH * (WIDTH + HIDDEN))
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = [*CALIBRATIONS, *OPERATIONS]
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        table(Path(name), arguments.tokens, arguments.stages)


def table(folder: Path, tokens: int, stages: list[str]) -> None:
    """Print a line a stage; calibrations that operations need are made where they are not asked for."""
    source = build(folder / "source")
    (reading, digesting), speed = read_seconds(source), flops_a_second()
    size = (source / "model.safetensors").stat().st_size
    print(
        f"one layer: {size / 1e9:.2f} GB, read in {reading:.2f} s, digested in {digesting:.2f} s; float32 products "
        f"at {speed / 1e9:.0f} GFLOP/s a core; {tokens} tokens; in seconds of all cores but for the first column:"
    )
    print(
        "stage         passed     used  start-up  digest floor  product floor  used/floors  resident GB"
    )
    kept = folder / "all"
    for stage in stages:
        if stage in CALIBRATIONS:
            output = kept if stage == "all" else folder / stage
            # Rows for --reconstruct; they cost nothing that could be measured.
            options = [*CALIBRATIONS[stage], "--tokens", tokens, "--inputs", min(tokens, 1024)]
            cost = run("calibrate", source, *options, "-o", output)
            options[options.index("--tokens") + 1] = 1024
            start = run("calibrate", TINY, *options, "-o", folder / f"tiny-{stage}")
        else:
            command, *options = OPERATIONS[stage]
            if stage != "aimer":
                if not kept.exists():
                    for model, place in ((source, kept), (TINY, folder / "tiny-all")):
                        run("calibrate", model, "--tokens", tokens, "--inputs", 1024, "-o", place)
                options += ["--calibration", str(kept)]
            output = folder / "output"
            cost = run(command, source, *options, "--experts", KEPT, "-o", output, "--force")
            options = [word.replace(str(kept), str(folder / "tiny-all")) for word in options]
            start = run(command, TINY, *options, "--experts", 8, "-o", output, "--force")
        floor = products(stage, tokens) / speed
        ratio = cost.cpu / (start.cpu + digesting + floor)
        over = "  ABOVE THE LIMIT" if cost.resident > LIMIT else ""
        print(
            f"{stage:12s} {cost.seconds:7.1f} {cost.cpu:8.1f} {start.cpu:9.1f} {digesting:13.2f} {floor:14.2f} "
            f"{ratio:12.1f} {cost.resident / 1e9:12.2f}{over}",
            flush=True,
        )


if __name__ == "__main__":
    main()
