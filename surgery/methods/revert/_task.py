"""What every pack is asked for: one of the inputs it was made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..base import required


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What the user chooses."""

    task: str = required("which input to take out, by its name in pack.json", metavar="NAME")
