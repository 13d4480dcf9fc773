"""Options that several commands share, as annotated types, and the sizes they accept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from moesurg.surgery.errors import UsageError

RUN, TEXT, SHOW = "How it runs", "Calibration text", "What is printed"
"""Panels of ``--help``."""

_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kmgt]?i?b?)", re.IGNORECASE | re.ASCII)
_FACTORS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, option: str) -> int:
    """Bytes from text such as ``4GB`` (10^9), ``512MiB`` (2^20) or ``1000000``.

    Raises:
        UsageError: not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is not None:
        unit = match["unit"].lower().removesuffix("b")
        base = 1024 if unit.endswith("i") else 1000
        power = _FACTORS.get(unit.removesuffix("i"))
        if power is not None and unit != "i":
            size = int(float(match["number"]) * base**power)
            if size > 0:
                return size
    raise UsageError(f"{option}: {text!r} is no size", hint="write for example 4GB or 512MiB")


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint: a folder, or a Hub id owner/name with an optional @revision.",
        show_default=False,
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoints: folders, or Hub ids owner/name with an optional @revision.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Folder to write; it appears complete or not at all.",
        show_default=False,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        "-f",
        help="Replace an existing output, once the new one is complete.",
        rich_help_panel=RUN,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        "-n",
        help="Plan and check everything from the headers, print the plan, write nothing.",
        rich_help_panel=RUN,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted run with the same inputs and options.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, metavar="N", help="Every random draw derives from it.", rich_help_panel=RUN
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        metavar="N",
        help="Units worked on at the same time; the result does not depend on it.",
        show_default="chosen from cores and memory",
        rich_help_panel=RUN,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="Memory the run may hold, such as 4GB or 512MiB.",
        show_default="what is free",
        rich_help_panel=RUN,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="Where tensors are computed: cpu, cuda or cuda:N.",
        rich_help_panel=RUN,
    ),
]
MaxShardSize = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Largest weight file of the output.",
        rich_help_panel=RUN,
    ),
]
Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Text or JSON Lines file to run through the model; may be repeated.",
        show_default="the Python standard library's own text",
        rich_help_panel=TEXT,
    ),
]
Tokens = Annotated[
    int,
    typer.Option(
        "--tokens", min=1, metavar="N", help="Tokens of text to use.", rich_help_panel=TEXT
    ),
]
SeqLen = Annotated[
    int,
    typer.Option(
        "--seq-len", min=2, metavar="N", help="Tokens in one sequence.", rich_help_panel=TEXT
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FOLDER",
        help="Statistics written by `moesurg calibrate`, instead of calibrating now.",
        show_default=False,
        rich_help_panel=TEXT,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="SOURCE",
        help="Checkpoint to compare with, as a folder or Hub id.",
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON document.", rich_help_panel=SHOW),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print no progress and no notes; warnings and errors remain.",
        rich_help_panel=SHOW,
    ),
]
