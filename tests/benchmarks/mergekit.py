"""mergekit in its own environment: one merge or extraction in a process of its own, its seconds and its memory."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
kind, arguments = sys.argv[1], json.loads(sys.argv[2])
if kind == "merge":
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    config = MergeConfiguration.model_validate(arguments["config"])
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    def work():
        run_merge(config, arguments["output"], options)
else:
    from mergekit.scripts.extract_lora import main
    def work():
        main(arguments["arguments"], standalone_mode=False)
print("ready", flush=True)
sys.stdin.readline()
started, used = time.perf_counter(), time.process_time()
work()
print(json.dumps([time.perf_counter() - started, time.process_time() - used]), flush=True)
"""


def measured(python: Path, kind: str, arguments: dict[str, Any]) -> tuple[float, float, int]:
    """Seconds and processor seconds from after the imports on, largest growth of anonymous memory in bytes.

    Args:
        python: interpreter of an environment that has mergekit.
        kind: ``merge`` (``config`` and ``output``) or ``extract`` (``arguments`` of its command line).
    """
    with subprocess.Popen(
        [str(python), "-c", CHILD, kind, json.dumps(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        errors: list[str] = []
        reading = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
        reading.start()
        if process.stdout.readline().strip() != "ready":
            reading.join()
            raise SystemExit(f"{python}: mergekit does not start: {''.join(errors)[-1000:]}")
        before = most = _anonymous(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while process.poll() is None:
            most = max(most, _anonymous(process.pid))
            time.sleep(0.002)
        reading.join()
        lines = process.stdout.read().splitlines()
        if process.returncode or not lines:
            raise SystemExit(f"mergekit {kind} failed: {''.join(errors)[-1000:]}")
        seconds, used = json.loads(lines[-1])
        return seconds, used, most - before


def merge_config(method: str, sources: Sequence[Path], dtype: str) -> dict[str, Any]:
    """The configuration of a merge with the options that our defaults mean."""
    if method == "linear":
        models = [{"model": str(s), "parameters": {"weight": 1.0}} for s in sources]
        return {"merge_method": "linear", "models": models, "dtype": dtype}
    density = {"ties": 0.2, "dare": 0.5, "della": 0.7}[method]
    name = {"ties": "ties", "dare": "dare_linear", "della": "della"}[method]
    base, *tuned = map(str, sources)
    parameters: dict[str, Any] = {"normalize": method != "dare"}
    if method == "della":
        parameters["epsilon"] = 0.07
    return {
        "merge_method": name,
        "base_model": base,
        "models": [
            {"model": one, "parameters": {"weight": 1.0, "density": density}} for one in tuned
        ],
        "parameters": parameters,
        "dtype": dtype,
    }


def _anonymous(pid: int) -> int:
    """Bytes of memory of a process that belong to no file; 0 once it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(found[0]) * 1024 if found else 0
