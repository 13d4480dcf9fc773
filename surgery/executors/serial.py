"""All units in this process, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..execute import Runner
from ..plan import Unit
from .base import Done


class SerialExecutor:
    """Runs units in plan order; nothing else is held while a unit runs."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def run(self, units: Sequence[Unit], decision: Callable[[Unit], Any], done: Done) -> None:
        for unit in units:
            done(unit, self._runner.run(unit.id, decision(unit)))
