"""What the command line prints: the result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

SCHEMA_VERSION = 1
"""Version of the documents that ``--json`` prints; a key that goes or changes meaning raises it."""

PIPE_WIDTH = 300
"""Columns where the output is no terminal, so that tables are not cut for a reader that is a program."""


def console(stream: TextIO) -> Console:
    """A console on a stream; ``NO_COLOR`` turns off every style, not colours only."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR"))
    return Console(
        file=stream,
        highlight=False,
        markup=False,
        color_system=None if plain else "auto",
        width=None if stream.isatty() else PIPE_WIDTH,
    )


def emit(record: Mapping[str, object], *, as_json: bool, human: Callable[[Console], None]) -> None:
    """Print a result, as one JSON document or through ``human``."""
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, **record}
        text = json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False)
        sys.stdout.write(text + "\n")
    else:
        human(console(sys.stdout))


def plain(value: object) -> Any:
    """A value as JSON has it: paths as text, tuples as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def failure(message: str, hint: str | None = None) -> None:
    """One sentence and the next step, on stderr."""
    err = console(sys.stderr)
    _tagged(err, "error:", message, "bold red")
    if hint:
        _tagged(err, "hint:", hint, "cyan")


def _tagged(where: Console, tag: str, sentence: str, style: str) -> None:
    from rich.text import Text

    where.print(Text.assemble((tag, style), " ", " ".join(sentence.split())), soft_wrap=True)


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; columns named in ``right`` hold numbers."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        found.add_column(column, justify="right" if column in right else "left")
    return found


def facts(rows: Mapping[str, str]) -> Table:
    """Names beside values."""
    from rich.table import Table

    found = Table.grid(padding=(0, 2))
    found.add_column(style="bold", no_wrap=True)
    found.add_column()
    for name, value in rows.items():
        found.add_row(name, value)
    return found


def in_bytes(count: object) -> str:
    """A number of bytes for people, in powers of ten as ``--max-shard-size 5GB`` counts."""
    if not isinstance(count, int | float):
        return "unknown"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def in_number(count: object) -> str:
    """A count of parameters for people."""
    if not isinstance(count, int | float):
        return "unknown"
    for factor, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if count >= factor:
            return f"{count / factor:.4g}{unit}"
    return f"{count:,}"


class Reporter:
    """Progress, notes and warnings on stderr.

    The library calls `stage`, `advance`, `note` and `warn`. A bar is drawn on a terminal only; notes go
    wherever stderr goes, unless ``quiet``. Used as a context manager, so that a bar never outlives its run.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stream = sys.stderr
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._draws = not quiet and self._stream.isatty()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""
        if not self._draws:
            return
        if self._bar is None:
            self._bar = _bar(console(self._stream))
            self._bar.start()
        self._task = self._bar.add_task(name, total=total)

    def advance(self, count: int = 1) -> None:
        """Steps of the current stage are done."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, count)

    def note(self, sentence: str) -> None:
        """Something worth knowing."""
        if not self._quiet:
            self._say("note:", sentence, "dim")

    def warn(self, sentence: str) -> None:
        """Something that may not be what the user wants; printed even when quiet."""
        self._say("warning:", sentence, "yellow")

    def _say(self, tag: str, sentence: str, style: str) -> None:
        where = self._bar.console if self._bar is not None else console(self._stream)
        _tagged(where, tag, sentence, style)


def _bar(where: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=where,
    )
