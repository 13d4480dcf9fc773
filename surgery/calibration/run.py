"""Statistics for a run: taken from a folder, or collected on the spot; and the ``calibrate`` command's work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import __version__
from ..architectures.model import Layer, Model
from ..checkpoint.commit import Staging
from ..checkpoint.hub import resolve
from ..checkpoint.reader import TensorReader
from ..digests import Digests, header_digest
from ..errors import InputError, UsageError
from ..methods.base import DataNeed
from ..plan import Unit
from ..progress import Progress, Stop, stoppable
from .corpus import Corpus, read_corpus
from .gram_folder import FreshGrams, FreshShifted, GivenGrams, Grams, calibrate_grams, layer_file
from .means import MODES, FreshMeans, Means
from .sequences import Sequences, tokenise
from .statistics import JSON_FILE, TENSOR_FILE, Statistics, model_digest

if TYPE_CHECKING:
    from .collect import Collected


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


def statistics_source(
    model: Model,
    *,
    calibration: Path | None,
    data: Sequence[Path],
    tokens: int,
    seq_len: int,
    mode: DataNeed,
    device: str,
    sample: int = 0,
    texts: int = 0,
    units: Sequence[Unit] = (),
    replacement: Callable[[Unit, Any, Any, Any], Any] | None = None,
    operate: Callable[[Layer, Statistics], tuple[Model, TensorReader]] | None = None,
    targets: bool = False,
) -> StatisticsSource:
    """A folder's statistics if one is given, otherwise statistics of ``data`` or the built-in text.

    Args:
        sample: rows of each mixture's (or, for means, feed-forward's) input that they must hold; every token's if
            the text has fewer.
        texts: how many texts mean inputs have to be of; 0 for any number.
        units, replacement: of a method that needs what its own replacements do to later inputs.
        operate: makes a layer from its statistics, in a run that goes from layer to layer.
        targets: such a run needs what the original mixtures give the sampled tokens.

    Raises:
        InputError: a folder of another model or without what the method needs, or unusable text.
        UsageError: a folder where matrices depend on the method's own options.
    """
    if mode == "shifted" and replacement is not None:
        if calibration is not None:
            raise UsageError(
                "--calibration: the inputs this method needs depend on what it replaces, so that no folder holds them",
                hint="give it text with --data, or nothing for the built-in text",
            )
        return FreshShifted(model, data, tokens, seq_len, device, units, replacement)
    if operate is not None:
        if calibration is not None:
            raise UsageError(
                "--sequential takes statistics behind the layers that it operates on, so that no folder holds them",
                hint="give the text with --data, or nothing for the built-in text, instead of --calibration",
            )
        fresh = _Fresh(model, data, tokens, seq_len, mode, device, sample)
        return fresh.behind(operate, targets)
    if mode in MODES:
        if calibration is not None:
            raise UsageError(
                "mean inputs are collected by the run itself",
                hint="give the texts with --data instead of --calibration",
            )
        return FreshMeans(
            model, data, tokens, seq_len, device, mode=mode, sample=sample, texts=texts
        )
    if mode == "gram":
        if calibration is None:
            return FreshGrams(model, data, tokens, seq_len, device)
        return GivenGrams(model, calibration)
    if calibration is None:
        return _Fresh(model, data, tokens, seq_len, mode, device, sample)
    return _Given(model, calibration, mode, sample)


def describe(statistics: Statistics | Grams | Means) -> dict[str, Any]:
    """What a report says of statistics."""
    text = statistics.manifest["text"]
    tokens = text.get("tokens") if isinstance(text, dict) else None
    return {
        "sha256": statistics.digest,
        "mode": statistics.mode,
        "domains": statistics.domains,
        "tokens": tokens,
        "text": text,
    }


class _Given:
    """Statistics that ``moesurg calibrate`` made."""

    files: tuple[str, ...] = ()

    def __init__(self, model: Model, folder: Path, mode: DataNeed, sample: int) -> None:
        self._folder = folder
        self._statistics = Statistics.open(folder)
        self._statistics.check_model(model)
        if mode == "all-expert" and self._statistics.mode != "all":
            raise InputError(
                f"{folder}: the method needs all-expert statistics, these are of routed experts only",
                hint="rerun calibrate without --routed-only",
            )
        if sample:
            self._check_sample(model, sample)
        self.identity: dict[str, Any] = {"folder": self._statistics.digest}
        self.place = str(folder.absolute())

    def _check_sample(self, model: Model, sample: int) -> None:
        text = self._statistics.manifest["text"]
        tokens = text.get("tokens") if isinstance(text, dict) else None
        needed = min(sample, tokens) if isinstance(tokens, int) else sample
        for layer in model.moe_layers:
            rows, _ = self._statistics.inputs_shape(layer.index)
            if rows < needed:
                raise InputError(
                    f"{self._folder}: holds {rows} sampled inputs of layer {layer.index}, "
                    f"the method needs {needed}",
                    hint=f"rerun moesurg calibrate with --inputs {needed}",
                )

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Statistics:
        return self._statistics

    def check(self, model: Model, digests: Mapping[Path, str]) -> None:
        self._statistics.check_model(model, model_digest(model.checkpoint, digests))

    def arguments(self) -> list[str]:
        return ["--calibration", str(self._folder)]


class _Fresh:
    """Statistics collected by the run itself, kept in its staging folder until the commit."""

    files: tuple[str, ...] = (JSON_FILE, TENSOR_FILE)

    def __init__(
        self,
        model: Model,
        data: Sequence[Path],
        tokens: int,
        seq_len: int,
        mode: DataNeed,
        device: str,
        sample: int,
    ) -> None:
        self._model, self._data, self._device, self._sample = model, data, device, sample
        self._mode = "all" if mode == "all-expert" else "routed"
        self._tokens, self._seq_len = tokens, seq_len
        self._corpus = read_corpus(data)
        self._collector: Callable[..., Collected] | None = None
        self.identity: dict[str, Any] = {
            "text": {domain.name: domain.digest for domain in self._corpus.domains},
            "tokens": tokens,
            "seq_len": seq_len,
            "mode": self._mode,
            "device": device,
            "inputs": sample,
        }
        self.place = "."

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Statistics:
        # A kept file may be from a run killed while writing it, so collect again: same text, same bytes.
        sequences = tokenise(
            self._corpus, self._model.folder, tokens=self._tokens, seq_len=self._seq_len
        )
        _tell_short(sequences, progress)
        files = _collect(
            self._model,
            sequences,
            staging.path,
            progress,
            stop,
            self._collector,
            mode=self._mode,
            device=self._device,
            inputs=min(self._sample, sequences.total),
        )
        for name, data in files.items():
            staging.write_file(name, data)
        return Statistics.open(staging.path)

    def behind(
        self, operate: Callable[[Layer, Statistics], tuple[Model, TensorReader]], targets: bool
    ) -> _Fresh:
        """The same, collected behind the layers that the run operates on and makes on the way."""
        from .sequential import collect_sequential

        self._collector = partial(collect_sequential, operate=operate, targets=targets)
        self.identity["sequential"] = True
        return self

    def check(self, model: Model, digests: Mapping[Path, str]) -> None:
        """They were collected from the weights being read."""

    def arguments(self) -> list[str]:
        words = [word for file in self._data for word in ("--data", str(file))]
        return [*words, "--tokens", str(self._tokens), "--seq-len", str(self._seq_len)]


def _collect(
    model: Model,
    sequences: Sequences,
    scratch: Path,
    progress: Progress,
    stop: Stop,
    collector: Callable[..., Collected] | None = None,
    **options: Any,
) -> dict[str, bytes]:
    """Collect statistics and their model's digest; returns the folder's files."""
    from .collect import collect

    digests = Digests(model.checkpoint.inputs)
    done = 0

    def report(_: str, finished: int, total: int) -> None:
        nonlocal done
        if not done:
            progress.stage("calibrating", total)
        progress.advance(finished - done)
        done = finished
        stop.check()

    with TensorReader(model.checkpoint) as reader:
        collected = (collector or collect)(
            model, reader, sequences, scratch=scratch, progress=report, **options
        )
    digest = model_digest(model.checkpoint, digests.finish())
    return collected.files({"model_sha256": digest, "moesurg": __version__})


def _tell_short(sequences: Sequences, progress: Progress) -> None:
    found = sequences.total
    if found < sequences.tokens:
        progress.warn(
            f"the text gives {found:,} of the {sequences.tokens:,} tokens asked for "
            + ", ".join(f"{name}: {count:,}" for name, count in sequences.tokens_by_domain.items())
        )


def calibrate(
    source: str,
    output: Path,
    *,
    data: Sequence[Path],
    tokens: int,
    seq_len: int,
    mode: DataNeed,
    inputs: int,
    gram: bool,
    trace: bool,
    linear_grams: bool = False,
    device: str,
    force: bool,
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Run text through a mixture once and write its statistics folder.

    Args:
        mode: ``all-expert`` computes every expert on every token; ``routed`` only selected ones.
        inputs: rows of each mixture's input to keep.
        gram: keep the Gram matrix of those inputs.
        trace: keep which experts every token selected.
        linear_grams: collect the Gram matrices of all linear layers instead, of any model.

    Returns:
        What was collected, JSON values.

    Raises:
        MoesurgError: any of its kinds; nothing is left behind.
    """
    started = time.monotonic()
    model = Model.open(resolve(source))
    if linear_grams:
        grams = calibrate_grams(
            model,
            output,
            data=data,
            tokens=tokens,
            seq_len=seq_len,
            device=device,
            force=force,
            resume=resume,
            progress=progress,
        )
        return {
            "schema_version": 1,
            "command": "calibrate",
            "output": str(output),
            "layers": grams.layers,
            **describe(grams),
            "files": [JSON_FILE, *(layer_file(layer) for layer in grams.layers)],
            "seconds": round(time.monotonic() - started, 3),
        }
    if not model.moe_layers:
        raise InputError(f"{model.folder}: {model.family.model_type} has no experts to calibrate")
    corpus: Corpus = read_corpus(data)
    options: dict[str, Any] = {
        "mode": "all" if mode == "all-expert" else "routed",
        "inputs": inputs,
        "gram": gram,
        "trace": trace,
        "device": device,
    }
    identity = {
        "moesurg": __version__,
        "command": "calibrate",
        "source": header_digest(model.checkpoint),
        "text": {domain.name: domain.digest for domain in corpus.domains},
        "tokens": tokens,
        "seq_len": seq_len,
        **options,
    }
    sequences = tokenise(corpus, model.folder, tokens=tokens, seq_len=seq_len)
    _tell_short(sequences, progress)
    with (
        stoppable(progress) as stop,
        Staging.open(
            output, identity, force=force, resume=resume, inputs=[model.folder, *data]
        ) as staging,
    ):
        if not staging.complete:
            files = _collect(model, sequences, staging.path, progress, stop, **options)
            for name, content in files.items():
                staging.write_file(name, content)
            staging.commit()
    statistics = Statistics.open(output)
    return {
        "schema_version": 1,
        "command": "calibrate",
        "output": str(output),
        "layers": statistics.layers,
        "experts": statistics.experts,
        **describe(statistics),
        "files": [TENSOR_FILE, JSON_FILE],
        "seconds": round(time.monotonic() - started, 3),
    }
