"""Where a run's statistics come from: a folder that is given, or text that the run itself puts through the model.

What every kind of statistics has in common here. ``expert_sources.py``, ``gram_folder.py`` and ``means.py`` hold the
kinds, ``run.py`` chooses among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import __version__
from ..checkpoint.reader import Checkpoint
from ..digests import Digests, header_digest
from .corpus import read_corpus
from .statistics import model_digest

if TYPE_CHECKING:
    from ..architectures.model import Model
    from ..checkpoint.commit import Staging
    from ..progress import Progress, Stop
    from .gram_folder import Grams
    from .means import Means
    from .sequences import Sequences
    from .statistics import Statistics


class StatisticsSource(Protocol):
    """Where a run's statistics come from."""

    identity: dict[str, Any]
    """What decides them, for the run's fingerprint."""
    place: str
    """Their folder: absolute, or relative to the run's staging folder."""

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Statistics | Grams | Means:
        """The statistics, collected now if need be."""

    @property
    def files(self) -> tuple[str, ...]:
        """Files in the staging folder that are no part of the output."""

    def check(self, model: Model, digests: Mapping[Path, str]) -> None:
        """Raise InputError unless they are of exactly these weights."""

    def arguments(self) -> list[str]:
        """The command-line arguments that ask for them."""


class Given:
    """A folder that ``moesurg calibrate`` made, opened.

    Raises:
        InputError: it is of another model.
    """

    files: tuple[str, ...] = ()

    def __init__(self, model: Model, opened: Statistics | Grams) -> None:
        self._opened = opened
        opened.check_model(model)
        self.identity: dict[str, Any] = {"folder": opened.digest}
        self.place = str(opened.folder.absolute())

    def check(self, model: Model, digests: Mapping[Path, str]) -> None:
        self._opened.check_model(model, model_digest(model.checkpoint, digests))

    def arguments(self) -> list[str]:
        return ["--calibration", str(self._opened.folder)]


class Fresh(ABC):
    """Statistics collected by the run itself, kept in its staging folder until the commit.

    Raises:
        InputError: unusable text.
    """

    files: tuple[str, ...]
    place = "."

    def __init__(
        self, model: Model, data: Sequence[Path], tokens: int, seq_len: int, device: str
    ) -> None:
        self.model, self.data, self._device = model, data, device
        self._tokens, self._seq_len = tokens, seq_len
        self._corpus = read_corpus(data)
        self.identity: dict[str, Any] = {
            "text": {domain.name: domain.digest for domain in self._corpus.domains},
            "tokens": tokens,
            "seq_len": seq_len,
            "device": device,
        }

    def _sequences(self, progress: Progress) -> Sequences:
        """The text in the model's tokens; tells of a text that is too short."""
        from .sequences import read_sequences

        return read_sequences(
            self._corpus,
            self.model.folder,
            tokens=self._tokens,
            seq_len=self._seq_len,
            progress=progress,
        )

    @abstractmethod
    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Statistics | Grams | Means:
        """Collect them. A kept file may be from a run killed while writing it: same text, same bytes."""

    def check(self, model: Model, digests: Mapping[Path, str]) -> None:  # noqa: B027
        """Nothing to find out: they were collected from the weights being read."""

    def arguments(self) -> list[str]:
        words = [word for file in self.data for word in ("--data", str(file))]
        return [*words, "--tokens", str(self._tokens), "--seq-len", str(self._seq_len)]


class Origin:
    """What a manifest says of where its numbers are from. Digests are computed while these are collected."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._digests = Digests(checkpoint.inputs)

    def finish(self) -> dict[str, object]:
        """JSON values, once the digests are known.

        Raises:
            InputError: a file could not be read.
        """
        digest = model_digest(self._checkpoint, self._digests.finish())
        return {"model_sha256": digest, "moesurg": __version__}


def keep_folder(
    fresh: Fresh, output: Path, *, force: bool, resume: bool, progress: Progress
) -> None:
    """Collect statistics into a folder of their own.

    Raises:
        MoesurgError: any of its kinds; nothing is left behind.
    """
    from ..checkpoint.commit import Staging
    from ..progress import stoppable

    identity = {
        "moesurg": __version__,
        "command": "calibrate",
        "source": header_digest(fresh.model.checkpoint),
        **fresh.identity,
    }
    inputs = [fresh.model.folder, *fresh.data]
    with (
        stoppable(progress) as stop,
        Staging.open(output, identity, force=force, resume=resume, inputs=inputs) as staging,
    ):
        if not staging.complete:
            fresh.load(staging, progress, stop)
            staging.commit()
