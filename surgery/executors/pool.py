"""Units over worker processes, as many at a time as fit in memory."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ..errors import StoppedError
from ..execute import Runner
from ..plan import Unit
from .base import Done

POLL = 0.5
"""Seconds between looks at how many steps workers did inside their units."""

_runner: Runner | None = None


def _start(folder: str, steps: Any) -> None:
    """Open plan, inputs and shards once per worker; the parent alone answers Ctrl-C.

    Args:
        steps: a number that all workers share.
    """
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _runner = Runner.open(Path(folder))

    def stepped() -> None:
        with steps.get_lock():
            steps.value += 1

    _runner.stepped = stepped


def _run(unit_id: str, decision: Any) -> dict[str, object]:
    if _runner is None:
        raise RuntimeError("the worker was not started")
    return _runner.run(unit_id, decision)


class PoolExecutor:
    """Spawned processes that open their own files; only unit names and metrics travel.

    Args:
        folder: the staging folder, holding the plan.
        workers: processes.
        memory: bytes that running units may hold together; None for no limit.
        advance: told of steps inside of units.
    """

    def __init__(
        self, folder: Path, workers: int, memory: int | None, advance: Callable[[int], None]
    ) -> None:
        self._advance = advance
        self._folder = folder
        self._workers = workers
        self._memory = memory

    def run(self, units: Sequence[Unit], decision: Callable[[Unit], Any], done: Done) -> None:
        waiting = list(reversed(units))
        running: dict[Future[dict[str, object]], Unit] = {}
        context = multiprocessing.get_context("spawn")
        steps, seen = context.Value("Q", 0), 0
        with ProcessPoolExecutor(
            self._workers,
            mp_context=context,
            initializer=_start,
            initargs=(str(self._folder), steps),
        ) as pool:
            try:
                while waiting or running:
                    while waiting and self._admits(waiting[-1], running.values()):
                        unit = waiting.pop()
                        running[pool.submit(_run, unit.id, decision(unit))] = unit
                    inside = any(unit.steps for unit in running.values())
                    finished, _ = wait(
                        running, POLL if inside else None, return_when=FIRST_COMPLETED
                    )
                    if steps.value > seen:
                        self._advance(steps.value - seen)
                        seen = steps.value
                    for future in finished:
                        unit = running.pop(future)
                        done(unit, future.result())
            except BrokenProcessPool as error:
                raise StoppedError(
                    "a worker process died (killed, or out of memory); finished units are kept",
                    hint="--resume continues; a smaller --workers or --max-memory needs less memory",
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _admits(self, unit: Unit, running: Any) -> bool:
        held = [other.memory for other in running]
        if not held:
            return True
        if len(held) >= self._workers:
            return False
        return self._memory is None or sum(held) + unit.memory <= self._memory
