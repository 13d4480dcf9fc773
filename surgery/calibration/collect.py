"""One pass over a text that collects what merging and pruning methods ask about the experts.

`layer_collector.py` is what stands in for a layer's experts meanwhile.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..architectures.model import Model
from ..checkpoint.reader import TensorReader
from ..errors import InputError, UsageError
from .forward import STATES_IN_MEMORY, LayerStream, Step
from .layer_collector import Mode, collector_of
from .sequences import Batch, Sequences
from .statistics import JSON_FILE, SCHEMA_VERSION, TENSOR_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is finished, and how much there is."""


@dataclass
class Collected:
    """Statistics in memory.

    Attributes:
        manifest: what was run on what, JSON values; without the model's digest until :meth:`files`.
        tensors: every array by its name in the file.
    """

    manifest: dict[str, object]
    tensors: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def files(self, extra: Mapping[str, object] | None = None) -> dict[str, bytes]:
        """The files of a statistics folder, by name. The same statistics give the same bytes.

        Args:
            extra: further JSON values of the manifest, such as ``{"model_sha256":
            model_digest(...)}``.
        """
        from safetensors.numpy import save

        manifest = {**self.manifest, **(extra or {})}
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        # No metadata: the library writes its keys in random order.
        return {TENSOR_FILE: save(self.tensors), JSON_FILE: text.encode()}


def collect(
    model: Model,
    reader: TensorReader,
    sequences: Sequences,
    *,
    mode: Mode = "all",
    device: str = "cpu",
    inputs: int = 0,
    gram: bool = False,
    trace: bool = False,
    max_memory: int = STATES_IN_MEMORY,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Run the text through the model and add up statistics of every MoE layer.

    Args:
        mode: ``routed`` computes selected experts only; ``all`` also every expert on every token,
            which output similarities need.
        inputs: keep this many rows of each mixture's input, evenly spread over the text, the same
            tokens in all layers, and the squared norm of each one's hidden state after the layer.
        gram: keep the Gram matrix of each mixture's inputs.
        trace: keep which experts every token selects.
        max_memory, scratch: of the hidden states, see :class:`LayerStream`.

    Raises:
        InputError: the model has no experts, or a value is not finite.
        UsageError: more inputs are asked for than there are tokens.
    """
    if not model.moe_layers:
        raise InputError(f"{model.folder}: {model.family.model_type} has no experts to calibrate")
    if not 0 <= inputs <= sequences.total:
        raise UsageError(f"--inputs: expected 0 to {sequences.total} (tokens), found {inputs}")
    stream = LayerStream(model, reader, device=device, max_memory=max_memory, scratch=scratch)
    sampled = np.arange(inputs, dtype=np.int64) * sequences.total // max(1, inputs)
    last = model.moe_layers[-1].index
    collected = Collected(manifest(model, sequences, stream.device, mode))
    with stream.run(sequences) as run:
        if inputs or trace:
            collected.tensors.update(places(run.batches, sampled, trace=trace))
        for step in run.layers():
            collector = collector_of(step, mode=mode, gram=gram, trace=trace, sampled=sampled)
            if collector is None:
                step.advance()
            else:
                collector.attach(step.module)
                step.advance(collector.begin)
                collected.tensors.update(collector.tensors(sequences))
                if inputs:
                    collected.tensors[f"energies.{step.index}"] = energies(step, sampled)
            if progress is not None:
                progress("layer", step.index + 1, last + 1)
            if step.index == last:  # what follows has no experts
                break
    return collected


def energies(step: Step, sampled: NDArray[np.int64]) -> NDArray[np.float64]:
    """Squared norms of the hidden states after a layer, of the sampled tokens."""
    after_ND = step.run.states.packed_TD[torch.from_numpy(sampled)]
    found: NDArray[np.float64] = after_ND.double().square().sum(-1).numpy()
    return found


def places(
    batches: list[Batch], sampled: NDArray[np.int64], *, trace: bool
) -> dict[str, NDArray[np.generic]]:
    """Which token and sequence the rows of inputs and traces belong to."""
    found: dict[str, NDArray[np.generic]] = {}
    if len(sampled):
        ids_T = np.concatenate([batch.ids_BT[batch.mask_BT] for batch in batches])
        domain_T = np.concatenate([np.full(b.stop - b.start, b.domain) for b in batches])
        found["inputs.token_ids"] = ids_T[sampled]
        found["inputs.domains"] = domain_T[sampled].astype(np.int64)
    if trace:
        lengths = [length for batch in batches for length in batch.lengths]
        domains = [batch.domain for batch in batches for _ in batch.lengths]
        found["sequences.lengths"] = np.asarray(lengths, np.int64)
        found["sequences.domains"] = np.asarray(domains, np.int64)
    return found


def manifest(
    model: Model, sequences: Sequences, device: torch.device, mode: Mode
) -> dict[str, object]:
    """What was run on what, JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model_type": model.family.model_type,
        "mode": mode,
        "layers": [layer.index for layer in model.moe_layers],
        "experts": model.experts,
        "top_k": model.rule.top_k,
        "hidden": model.config.hidden,
        "text": sequences.manifest(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
    }
