"""How well a model predicts a text, and how far it is from a reference. Streams stock classes by layer.

T tokens, V vocabulary. Perplexity is exp of the mean negative log-likelihood of next tokens; a
sequence's first token has no prediction. KL divergence, top-1 agreement and logit drift compare
every position of every sequence.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .architectures.model import Model
from .calibration.corpus import read_corpus
from .calibration.forward import STATES_IN_MEMORY
from .calibration.sequences import Batch, Sequences, read_sequences
from .checkpoint.hub import resolve
from .checkpoint.reader import TensorReader
from .custom import CustomModel, is_custom_folder
from .errors import InputError
from .predictor import BATCH_TOKENS, Loaded, Logits, Predictor, Streamed, vocabulary
from .progress import Progress

LOGITS = 1 << 23
"""Most logits of a model that are held at a time."""

Report = Callable[[str, int, int], None]
"""Told which model is run, how many of its layers are done, and how many there are."""


@dataclass
class Tally:
    """Sums over the positions of a domain.

    Attributes:
        tokens: positions.
        predicted: positions with a next token.
        loss: sum of -log p(next token), nats.
        divergence: sum of KL(reference || model), nats.
        agreed: positions where both models rank the same token first.
        drift: largest |difference of logits|.
    """

    tokens: int = 0
    predicted: int = 0
    loss: float = 0.0
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    drift: float = 0.0

    def add(self, other: Tally) -> None:
        self.tokens += other.tokens
        self.predicted += other.predicted
        self.loss += other.loss
        self.reference_loss += other.reference_loss
        self.divergence += other.divergence
        self.agreed += other.agreed
        self.drift = max(self.drift, other.drift)

    def report(self, *, compared: bool) -> dict[str, object]:
        found: dict[str, object] = {
            "tokens": self.tokens,
            "predicted": self.predicted,
            **_perplexity(self.loss, self.predicted),
        }
        if compared:
            reference = _perplexity(self.reference_loss, self.predicted)
            found.update({f"reference_{key}": value for key, value in reference.items()})
            found["kl"] = self.divergence / self.tokens
            found["top1_agreement"] = self.agreed / self.tokens
            found["max_logit_difference"] = self.drift
        return found


def _perplexity(loss: float, predicted: int) -> dict[str, object]:
    """Mean loss and its exponential; None where nothing is predicted or it overflows."""
    if not predicted:
        return {"loss": None, "perplexity": None}
    mean = loss / predicted
    return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else None}


def evaluate(
    model: Model | CustomModel,
    reader: TensorReader,
    sequences: Sequences,
    *,
    reference: tuple[Model | CustomModel, TensorReader] | None = None,
    device: str = "cpu",
    max_memory: int = STATES_IN_MEMORY,
    scratch: Path | None = None,
    progress: Report | None = None,
) -> dict[str, object]:
    """Measure a model on a text, per domain and over all.

    Args:
        reference: the model to compare with, usually the one it was made from.
        max_memory, scratch: of the hidden states, see :class:`LayerStream`.

    Returns:
        JSON values: ``overall`` and ``domains`` (by name), each with ``tokens``, ``predicted``,
        ``loss`` (nats) and ``perplexity``; with a reference also ``reference_loss``,
        ``reference_perplexity``, ``kl`` = mean KL(reference || model) in nats, ``top1_agreement``
        and ``max_logit_difference``. Logits in float32, sums in float64.

    Raises:
        InputError: the vocabularies differ, or a token id is outside them.
    """
    models = [(model, reader), *([reference] if reference is not None else [])]
    if reference is not None:
        _same_vocabulary(model, reference[0])
    predictors: list[Predictor] = []
    for name, (one, weights) in zip(("model", "reference"), models, strict=False):

        def report(done: int, total: int, name: str = name) -> None:
            if progress is not None:
                progress(name, done, total)

        predictors.append(
            Loaded(one, device=device, report=report)
            if isinstance(one, CustomModel)
            else Streamed(
                one,
                weights,
                sequences,
                device=device,
                max_memory=max_memory,
                scratch=scratch,
                report=report,
            )
        )
    block = max(1, LOGITS // vocabulary(model))
    tallies = [Tally() for _ in sequences.domains]
    for batch in sequences.batches(BATCH_TOKENS):
        for index in range(len(batch.lengths)):
            logits = [predictor.sequence(batch, index) for predictor in predictors]
            tallies[batch.domain].add(_measure(batch, index, logits, block))
    overall = Tally()
    for tally in tallies:
        overall.add(tally)
    compared = reference is not None
    return {
        "overall": overall.report(compared=compared),
        "domains": {
            name: tally.report(compared=compared)
            for name, tally in zip(sequences.domains, tallies, strict=True)
            if tally.tokens
        },
    }


def drift(
    model: Model,
    reference: Model | CustomModel,
    token_ids: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
) -> float:
    """Largest |difference of float32 logits| between two models on given sequences.

    Raises:
        InputError: the vocabularies differ, or a token id is outside them.
    """
    sequences = Sequences.from_ids(token_ids)
    with TensorReader(model.checkpoint) as reader, TensorReader(reference.checkpoint) as other:
        found = evaluate(model, reader, sequences, reference=(reference, other), device=device)
    overall = found["overall"]
    if not isinstance(overall, dict):
        raise TypeError("evaluate reports overall as a dict")
    return float(overall["max_logit_difference"])


def evaluate_sources(
    source: str,
    *,
    reference: str | None,
    data: Sequence[Path],
    tokens: int,
    seq_len: int,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """The ``eval`` command's work: :func:`evaluate` on folders or Hub ids, and what it was run on.

    The text is tokenised by the model's tokenizer, for both models. Outputs with model code are loaded whole, with the
    installed copy of that code.

    Raises:
        MoesurgError: any of its kinds.
    """
    started = time.monotonic()
    model = open_either(resolve(source))
    other = None if reference is None else open_either(resolve(reference))
    if other is not None:
        _same_vocabulary(model, other)
    sequences = read_sequences(
        read_corpus(data), model.folder, tokens=tokens, seq_len=seq_len, progress=progress
    )

    def report(name: str, done: int, total: int) -> None:
        if done == 1:
            progress.stage(f"running the {name}", total)
        progress.advance()

    with ExitStack() as stack:
        reader = stack.enter_context(TensorReader(model.checkpoint))
        pair = None
        if other is not None:
            pair = (other, stack.enter_context(TensorReader(other.checkpoint)))
        found = evaluate(model, reader, sequences, reference=pair, device=device, progress=report)
    return {
        "schema_version": 1,
        "command": "eval",
        "model": str(model.folder),
        "reference": None if other is None else str(other.folder),
        "text": sequences.manifest(),
        **found,
        "seconds": round(time.monotonic() - started, 3),
    }


def open_either(folder: Path) -> Model | CustomModel:
    """A stock model, or an output of moesurg that brings code.

    Raises:
        InputError: naming the first thing that is wrong with it.
    """
    return CustomModel.open(folder) if is_custom_folder(folder) else Model.open(folder)


def _same_vocabulary(model: Model | CustomModel, reference: Model | CustomModel) -> None:
    own, other = vocabulary(model), vocabulary(reference)
    if own != other:
        raise InputError(
            f"{model.folder}: has a vocabulary of {own}, the reference {reference.folder} one of {other}",
            hint="compare with a model of the same tokenizer",
        )


def _measure(batch: Batch, index: int, logits: Sequence[Logits], block: int) -> Tally:
    """One sequence, in blocks of tokens whose logits fit."""
    ids_T = torch.from_numpy(batch.ids_BT[index, : batch.lengths[index]])
    next_T = torch.full_like(ids_T, -1)  # -1: the last token
    next_T[:-1] = ids_T[1:]
    tally = Tally()
    for begin in range(0, len(ids_T), block):
        here = slice(begin, begin + block)
        found = [of(here) for of in logits]
        tally.add(_compare(next_T[here].to(found[0].device), found))
    return tally


def _compare(target_T: torch.Tensor, logits: Sequence[torch.Tensor]) -> Tally:
    """Float32 logits [T, V] of the model, and of the reference if there is one."""
    predicted_T = target_T >= 0
    tally = Tally(tokens=len(target_T), predicted=int(predicted_T.sum()))
    # float64: the divergence of nearly equal models is a small difference of large sums.
    log_TV = logits[0].double().log_softmax(-1)
    tally.loss = _loss(log_TV, target_T, predicted_T)
    if len(logits) > 1:
        reference_TV = logits[1].double().log_softmax(-1)
        tally.reference_loss = _loss(reference_TV, target_T, predicted_T)
        tally.divergence = float((reference_TV.exp() * (reference_TV - log_TV)).sum())
        tally.agreed = int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        tally.drift = float((logits[0] - logits[1]).abs().max())
    return tally


def _loss(log_TV: torch.Tensor, target_T: torch.Tensor, predicted_T: torch.Tensor) -> float:
    chosen_T = log_TV.gather(1, target_T.clamp(min=0)[:, None])[:, 0]
    return -float(chosen_T[predicted_T].sum())
