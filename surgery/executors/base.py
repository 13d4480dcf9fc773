"""What every executor promises, and how many workers a plan deserves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RefusedError
from ..plan import Plan, Unit

Done = Callable[[Unit, dict[str, object]], None]
"""Called in the main process, in any order, once a unit's bytes are written; may raise to stop the run."""

POOL_WORTH = 2_000_000_000
"""Bytes of output below which starting processes (seconds each, for torch) costs more than it saves."""

WORKER_BYTES = 400_000_000
"""What an idle worker holds: interpreter and libraries."""


class Executor(Protocol):
    """Runs units in any order and with any parallelism; the bytes written do not depend on it."""

    def run(self, units: Sequence[Unit], decision: Callable[[Unit], Any], done: Done) -> None:
        """Run all units, reporting each; raises the first error, after running units have ended."""


def available_memory() -> int | None:
    """Bytes the system says can be used, or None where it does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def choose_workers(plan: Plan, workers: int | None, max_memory: int | None) -> int:
    """How many processes to use; 1 means this process.

    Args:
        workers: what the user asked for, or None to choose.
        max_memory: bytes the run may hold, or None for four fifths of what is available.

    Raises:
        RefusedError: the largest unit alone needs more than ``max_memory``.
    """
    budget = memory_budget(max_memory)
    if budget is not None and plan.memory > budget:
        hungry = max(plan.units, key=lambda unit: unit.memory)
        raise RefusedError(
            f"unit {hungry.id} needs about {plan.memory:,} bytes of memory, the run may use {budget:,}",
            hint="raise --max-memory, or run where there is more",
        )
    if workers is not None:
        return workers
    transforms = sum(1 for unit in plan.units if unit.kind == "transform")
    if plan.bytes < POOL_WORTH or transforms < 2 * len(plan.units) // 3:
        return 1
    count = min(os.cpu_count() or 1, transforms)
    if budget is not None:
        count = min(count, budget // (plan.memory + WORKER_BYTES))
    return max(1, count)


def memory_budget(max_memory: int | None) -> int | None:
    """The bytes running units may hold together, or None where nothing is known."""
    if max_memory is not None:
        return max_memory
    free = available_memory()
    return None if free is None else free * 4 // 5
