"""Statistics for a run: taken from a folder, or collected on the spot; and the ``calibrate`` command's work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..architectures.model import Layer, Model
from ..checkpoint.hub import resolve
from ..checkpoint.reader import TensorReader
from ..errors import InputError, UsageError
from ..methods.base import DataNeed
from ..plan import Unit
from ..progress import Progress
from .expert_sources import FreshStatistics, GivenStatistics
from .gram_folder import FreshGrams, FreshShifted, GivenGrams, Grams, calibrate_grams, layer_file
from .means import MODES, FreshMeans, Means
from .sources import StatisticsSource, keep_folder
from .statistics import JSON_FILE, TENSOR_FILE, Statistics


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
        fresh = FreshStatistics(model, data, tokens, seq_len, mode, device, sample)
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
        return FreshStatistics(model, data, tokens, seq_len, mode, device, sample)
    return GivenStatistics(model, calibration, mode, sample)


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
    fresh = FreshStatistics(
        model, data, tokens, seq_len, mode, device, inputs, {"gram": gram, "trace": trace}
    )
    keep_folder(fresh, output, force=force, resume=resume, progress=progress)
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
