"""Starting fast: what is asked before a weight is touched imports none of the heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "scipy", "sklearn", "transformers", "tokenizers", "huggingface_hub")

PROBE = """
import json, resource, sys
from moesurg.commands.app import main
code = main(sys.argv[1:])
sys.stdout.flush()
used = resource.getrusage(resource.RUSAGE_SELF)
modules = sorted({name.partition(".")[0] for name in sys.modules})
json.dump([code, modules, used.ru_utime + used.ru_stime], sys.stderr)
"""


def probe(*arguments: str) -> tuple[int, set[str], float]:
    """Exit code, top-level modules at the end, and CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MOESURG_DEBUG": ""},
    )
    code, modules, seconds = json.loads(done.stderr.strip().splitlines()[-1])
    return code, set(modules), seconds


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["upcycle", "--help"],
        ["merge", "--help"],
        ["merge", "--method", "sub-moe", "--help"],
        ["prune", "--method", "naee", "--help"],
        ["compress", "--method", "svd-llm", "--help"],
        ["expert", "--help"],
        ["expert", "drop", "--help"],
        ["calibrate", "--help"],
        ["inspect", "--help"],
        ["eval", "--help"],
        ["verify", "--help"],
        ["methods"],
        ["methods", "--json"],
        ["methods", "--markdown"],
    ],
    ids=" ".join,
)
def test_asking_imports_nothing_heavy(arguments: list[str]) -> None:
    code, modules, seconds = probe(*arguments)
    assert code == 0
    assert modules.isdisjoint(HEAVY), modules & set(HEAVY)
    # 0.3 s on the slowest machine seen; the bound only catches an import that the list does not know.
    assert seconds < 1.5


def test_a_usage_error_imports_nothing_heavy() -> None:
    code, modules, _ = probe("merge", "somewhere", "--method", "sub-moe", "--experts", "4")
    assert code == 2  # --output is missing
    assert modules.isdisjoint(HEAVY)


def test_inspecting_and_planning_read_headers_without_torch(
    checkpoint: Callable[..., Path],
) -> None:
    folder = str(checkpoint("qwen3_moe"))
    plan = ["merge", folder, "--method", "m-smoe", "--experts", "4", "--dry-run"]
    prune = ["prune", folder, "--method", "naee", "--experts", "4", "--dry-run"]
    adapter, shelf = str(checkpoint("adapter")), str(checkpoint("adapter").parent)
    pack = str(checkpoint("pack", method="rmm", basis=1, allow_larger=True))
    told = [["inspect", source] for source in (folder, adapter, shelf, pack)]
    for arguments in (*told, plan, prune):
        code, modules, _ = probe(*arguments)
        assert code == 0
        assert modules.isdisjoint({"torch", "transformers"})
