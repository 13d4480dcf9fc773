"""Verification of an output that brings model code: the code is compared with ours, and ours is what runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architectures.model import Model
from .calibration.corpus import default_corpus
from .calibration.sequences import tokenise
from .checkpoint.reader import Checkpoint, contained
from .errors import InputError, VerificationError
from .executors.base import memory_budget
from .modeling import PREFIX, auto_map, files
from .progress import Progress
from .seeding import stream

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
    for name, code in files().items():
        if not (folder / name).is_file() or contained(folder, name).read_bytes() != code:
            raise VerificationError(
                f"{folder / name}: is not the model code of this version of moesurg, so it is not run",
                hint="verify with the version that report.json names",
            )
    promised = dict(report["exactness"]) | {"measured": None, "reference": None}
    size, budget = int(report["output"]["bytes"]), memory_budget(None)
    if budget is not None and 4 * size > budget:
        return "not tried: the model is larger than the memory that is free", promised
    progress.stage("loading", 1)
    model = _load(checkpoint)
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


def _load(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers.utils import logging as stock_logging

    from .modeling import modeling_moesurg

    folder, config = checkpoint.folder, checkpoint.config
    names = config.get("architectures")
    model_type = config.get("model_type")
    stock = names[0].removeprefix("Moesurg") if isinstance(names, list) and names else ""
    if (
        not stock
        or config.get("auto_map") != auto_map(stock)
        or not str(model_type).startswith(PREFIX)
    ):
        raise VerificationError(
            f"{folder / 'config.json'}: architectures, model_type and auto_map do not agree"
        )
    own = auto_map(stock)
    logging: Any = stock_logging
    logging.disable_progress_bar()
    try:
        config_class: Any = getattr(modeling_moesurg, own["AutoConfig"].rpartition(".")[2])
        model_class: Any = getattr(modeling_moesurg, own["AutoModelForCausalLM"].rpartition(".")[2])
        model, found = model_class.from_pretrained(
            folder,
            config=config_class.from_pretrained(folder, local_files_only=True),
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except (
        Exception
    ) as error:  # whatever transformers raises for a config or weights that do not fit
        raise VerificationError(f"{folder}: does not load with its model code ({error})") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise VerificationError(
                f"{folder}: loading reports {kind.replace('_', ' ')}: {sorted(found[kind])[:3]}"
            )
    return model.eval()


def _drift(model: Any, source: Model, device: str) -> float:
    """Largest |difference of float32 logits| from the source, which is streamed layer by layer."""
    import torch

    from .calibration.forward import LayerStream
    from .calibration.sequences import Sequences
    from .checkpoint.reader import TensorReader

    sequences = Sequences.from_ids(_ids(source))
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


def _ids(source: Model) -> list[list[int]]:
    """The built-in text, or fixed pseudo-random ids where the folder has no tokenizer."""
    try:
        found = tokenise(default_corpus(), source.folder, tokens=CHECK_TOKENS, seq_len=CHECK_LENGTH)
        return [[int(token) for token in ids] for ids in found.ids]
    except InputError:
        drawn = stream(0, "verify").integers(0, source.config.vocab, CHECK_TOKENS)
        ids = [int(token) for token in drawn]
        return [ids[at : at + CHECK_LENGTH] for at in range(0, CHECK_TOKENS, CHECK_LENGTH)]
