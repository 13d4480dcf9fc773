"""Verification of an output that brings model code: the code is compared with ours, and ours is what runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architectures.model import Model
from .check_text import check_ids
from .checkpoint.reader import Checkpoint
from .custom import foreign_file, load_custom
from .errors import InputError, VerificationError
from .executors.base import memory_budget
from .progress import Progress

if TYPE_CHECKING:
    import torch

CHECK_TOKENS, CHECK_LENGTH = 256, 64
"""Tokens on which the distance from the source is measured, and those of one sequence."""


def verify_custom(
    checkpoint: Checkpoint,
    report: Mapping[str, Any],
    source: Path | None,
    device: str,
    progress: Progress,
) -> tuple[str, dict[str, Any]]:
    """Load a custom output, and measure it against its source where that is at hand.

    Returns:
        How it was loaded, and the promised exactness with what was measured.

    Raises:
        VerificationError: the folder's code is not ours, or does not fit its weights.
    """
    folder = checkpoint.folder
    wrong = foreign_file(folder)
    if wrong is not None:
        raise VerificationError(
            f"{wrong}: is not the model code of this version of moesurg, so it is not run",
            hint="verify with the version that report.json names",
        )
    promised = dict(report["exactness"]) | {"measured": None, "reference": None}
    size, budget = int(report["output"]["bytes"]), memory_budget(None)
    if budget is not None and 4 * size > budget:
        return "not tried: the model is larger than the memory that is free", promised
    progress.stage("loading", 1)
    try:
        model = load_custom(checkpoint)
    except InputError as error:
        raise VerificationError(error.message, hint=error.hint) from error
    progress.advance()
    loaded = "the model code of moesurg, no missing and no unexpected key"
    if source is None:
        return loaded, promised
    progress.stage("measuring", 1)
    measured = _drift(model, Model.open(source), device)
    progress.advance()
    return loaded, promised | {
        "measured": measured,
        "measure": "largest |difference of logits|",
        "reference": str(source),
    }


def _drift(model: Any, source: Model, device: str) -> float:
    """Largest |difference of float32 logits| from the source, which is streamed layer by layer."""
    import torch

    from .calibration.forward import LayerStream
    from .calibration.sequences import Sequences
    from .checkpoint.reader import TensorReader

    sequences = Sequences.from_ids(check_ids(source, CHECK_TOKENS, CHECK_LENGTH))
    with TensorReader(source.checkpoint) as reader:
        layers = LayerStream(source, reader, device=device)
        with layers.run(sequences) as run:
            for step in run.layers():
                step.advance()
            run.finish()
            head = layers.head()
            worst = 0.0
            for batch in run.batches:
                wanted_TV = head(run.states.packed_TD[batch.start : batch.stop]).cpu()
                mask_BT = torch.from_numpy(batch.mask_BT)
                found_TV = _logits(model, torch.from_numpy(batch.ids_BT), mask_BT)
                worst = max(worst, float((found_TV - wanted_TV).abs().max()))
    return worst


def _logits(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits_BTV: torch.Tensor = model(
            input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False
        ).logits
    return logits_BTV[mask_BT].float()
