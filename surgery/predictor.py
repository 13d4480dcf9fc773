"""Logits of a model on a text, sequence by sequence: streamed by layer where the classes are stock, else loaded whole.

T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from .architectures.config import Config
from .architectures.model import Model
from .calibration.forward import LayerStream, compute_device
from .calibration.sequences import Batch, Sequences
from .checkpoint.reader import TensorReader
from .custom import CustomModel, foreign_file, load_custom
from .errors import InputError

BATCH_TOKENS = 4096
Report = Callable[[int, int], None]
"""Told how many steps are done, and how many there are."""

Logits = Callable[[slice], torch.Tensor]
"""Float32 logits [T, V] of a range of a sequence's tokens."""


class Predictor(Protocol):
    """A model that has seen a text."""

    def sequence(self, batch: Batch, index: int) -> Logits:
        """The logits of one sequence of a batch."""


class Streamed:
    """A stock model run layer by layer; all hidden states are kept, logits are computed when asked for."""

    def __init__(
        self,
        model: Model,
        reader: TensorReader,
        sequences: Sequences,
        *,
        device: str,
        max_memory: int,
        scratch: Path | None,
        report: Report,
    ) -> None:
        stream = LayerStream(
            model,
            reader,
            device=device,
            batch_tokens=BATCH_TOKENS,
            max_memory=max_memory,
            scratch=scratch,
        )
        self._run = stream.run(sequences)
        for step in self._run.layers():
            step.advance()
            report(step.index + 1, len(model.layers))
        self._run.finish()
        self._head = stream.head()

    def sequence(self, batch: Batch, index: int) -> Logits:
        first = batch.start + sum(batch.lengths[:index])
        count = batch.lengths[index]

        def logits(part: slice) -> torch.Tensor:
            begin, end, _ = part.indices(count)
            return self._head(self._run.states.packed_TD[first + begin : first + end])

        return logits


class Loaded:
    """A model with code of ours, whole in memory in float32; the installed code runs, never the folder's.

    Raises:
        InputError: the folder's code is another version's, or its weights do not fit.
    """

    def __init__(self, model: CustomModel, *, device: str, report: Report) -> None:
        wrong = foreign_file(model.folder)
        if wrong is not None:
            raise InputError(
                f"{wrong}: is not the model code of this version of moesurg, so it is not run",
                hint="use the version that report.json names",
            )
        self._device = compute_device(device)
        self._model: Any = load_custom(model.checkpoint).to(self._device)
        report(1, 1)

    def sequence(self, batch: Batch, index: int) -> Logits:
        ids_1T = torch.from_numpy(batch.ids_BT[index : index + 1, : batch.lengths[index]])
        with torch.no_grad():
            found = self._model(input_ids=ids_1T.to(self._device), use_cache=False)
        logits_TV: torch.Tensor = found.logits[0].float()
        return lambda part: logits_TV[part]


def vocabulary(model: Model | CustomModel) -> int:
    """How many token ids a model knows."""
    if isinstance(model, Model):
        return model.config.vocab
    where = str(model.folder / "config.json")
    return Config(model.stock_config, model.family.defaults, where).vocab
