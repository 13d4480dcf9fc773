"""Telling a person how far a run is, and letting a person stop it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from .errors import Interrupted


class Progress(Protocol):
    """What the library calls; the command line draws it on stderr."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def advance(self, count: int = 1) -> None:
        """Steps of the running stage are done."""

    def note(self, sentence: str) -> None:
        """Something worth knowing."""

    def warn(self, sentence: str) -> None:
        """Something worth acting on."""


class Silent:
    """A progress that says nothing."""

    def stage(self, name: str, total: int) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, sentence: str) -> None:
        pass

    def warn(self, sentence: str) -> None:
        pass


class Stop:
    """Whether a signal has asked the run to stop; asked between units."""

    def __init__(self) -> None:
        self.signal = 0

    def check(self) -> None:
        """Raise Interrupted once a signal came."""
        if self.signal:
            raise Interrupted(
                f"stopped by {signal.Signals(self.signal).name}; finished work is kept",
                signal=self.signal,
                hint="the same command with --resume continues",
            )


@contextmanager
def stoppable(progress: Progress) -> Iterator[Stop]:
    """While inside, the first SIGINT or SIGTERM asks for a stop at the next safe point; the second kills.

    Only the main thread may set handlers; elsewhere the signals keep their meaning.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        for which in before:
            signal.signal(which, signal.SIG_DFL)
        progress.note("stopping after the running unit; once more to stop at once")

    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    for which in before:
        signal.signal(which, handle)
    try:
        yield stop
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
