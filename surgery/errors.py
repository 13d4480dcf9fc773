"""The errors a user can cause or meet, one class for each documented exit code.

Every message is one sentence that says what is wrong, where, what was expected and what was found;
``hint`` says what to do next. The command line prints both and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MoesurgError(Exception):
    """Base of every error that moesurg raises on purpose.

    Args:
        message: what happened, where, expected against found.
        hint: the next step for the user, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MoesurgError):
    """The command line asks for something that no input could make sense of (exit code 2)."""

    exit_code = 2


class InputError(MoesurgError):
    """A checkpoint, config, data file or method/model combination is bad or unsupported (3)."""

    exit_code = 3


class RefusedError(MoesurgError):
    """The input is fine but the run would not be: output exists, disk or memory lacking (4)."""

    exit_code = 4


class VerificationError(MoesurgError):
    """``verify`` found a difference between a folder and its report (5)."""

    exit_code = 5


class StoppedError(MoesurgError):
    """The run stopped in a state that ``--resume`` continues (75)."""

    exit_code = 75


class Interrupted(StoppedError):
    """A signal asked the run to stop; it stopped between units (130 for SIGINT, 143 for SIGTERM)."""

    def __init__(self, message: str, *, signal: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal


@contextmanager
def as_written(file: Path) -> Iterator[None]:
    """Tells of a file of ours that lacks what it should say, instead of failing on it.

    Raises:
        InputError: what was looked for in it is not there or of another kind.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: does not say what this version of moesurg writes there "
            f"({type(error).__name__}: {error})",
            hint="it was changed after it was written, or another version wrote it",
        ) from error
