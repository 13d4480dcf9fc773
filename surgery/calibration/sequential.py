"""Statistics of a mixture whose layers are operated on one after the other.

Hidden states pass through a model whose layers before the one in question are as the run will write them. There the
stock layer, with its original experts, is given the text and its statistics are collected; from them the method decides
and makes the new layer, through which the states go on. Where the method solves for a layer's output, the original
model's states pass by as well, and what its mixture gives the sampled tokens is kept as the target.

What is decided and made here is decided and made again by the run, from the same stored statistics, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..architectures.model import Layer, Model
from ..checkpoint.header import TensorInfo
from ..checkpoint.reader import TensorReader
from ..errors import MoesurgError
from .blocks import recast
from .collect import Collected, Progress, energies, manifest, places
from .forward import LayerStream, Step
from .layer_collector import Mode, collector_of
from .sequences import Batch, Sequences
from .statistics import Statistics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.generic]]

Operate = Callable[[Layer, Statistics], tuple[Model, TensorReader]]
"""From a layer and its statistics to the model with the new layer, and what reads it."""

KINDS = {"float64": "F64", "float32": "F32", "int64": "I64", "uint8": "U8", "uint16": "U16"}


class HeldStatistics(Statistics):
    """Statistics that are in memory, of the layers whose arrays there are."""

    def __init__(self, folder: Path, manifest: dict[str, object], arrays: Arrays) -> None:
        self._arrays = arrays
        infos = {
            name: TensorInfo(name, KINDS[str(array.dtype)], array.shape, folder, 0, array.nbytes)
            for name, array in arrays.items()
        }
        super().__init__(folder, manifest, infos)

    def _read(self, info: TensorInfo) -> NDArray[Any]:
        return self._arrays[info.name]


def collect_sequential(
    model: Model,
    reader: TensorReader,
    sequences: Sequences,
    operate: Operate,
    *,
    mode: Mode,
    device: str = "cpu",
    inputs: int = 0,
    targets: bool = False,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Run the text through the layers as they are operated on.

    Args:
        mode, inputs: as in :func:`collect`.
        targets: keep what the original model's mixtures give the sampled tokens.

    Raises:
        InputError: a value is not finite.
    """
    first = LayerStream(model, reader, device=device, scratch=scratch) if targets else None
    second = LayerStream(model, reader, device=device, scratch=scratch)
    sampled = np.arange(inputs, dtype=np.int64) * sequences.total // max(1, inputs)
    last = model.moe_layers[-1].index
    facts = {**manifest(model, sequences, second.device, mode), "sequential": True}
    collected = Collected(facts)
    with ExitStack() as stack:
        run = stack.enter_context(second.run(sequences))
        original = None if first is None else stack.enter_context(first.run(sequences)).layers()
        common = places(run.batches, sampled, trace=False) if inputs else {}
        collected.tensors.update(common)
        for step in run.layers():
            beside = None if original is None else next(original)
            if step.layer.experts is not None:
                arrays = _observe(step, mode, sampled)
                if beside is not None:
                    arrays[f"targets.{step.index}"] = _target(beside, sampled)
                    arrays[f"energies.{step.index}"] = energies(beside, sampled)
                held = HeldStatistics(
                    model.folder, {**facts, "layers": [step.index]}, {**common, **arrays}
                )
                operated, source = operate(step.layer, held)
                step.module = second.stock_of(operated).layer(step.index, source)
                collected.tensors.update(arrays)
            step.advance()
            if progress is not None:
                progress("layer", step.index + 1, last + 1)
            if step.index == last:  # what follows has no experts
                break
    return collected


def _observe(step: Step, mode: Mode, sampled: NDArray[np.int64]) -> Arrays:
    """The layer's statistics on the states before it, which stay."""
    collector = collector_of(step, mode=mode, gram=False, trace=False, sampled=sampled)
    if collector is None:
        raise MoesurgError(f"layer {step.index} has no experts")
    collector.attach(step.module)
    step.observe(collector.begin)
    return collector.tensors(step.run.sequences)


def _target(step: Step, sampled: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the layer's mixture gives the sampled tokens, [N, D]; the states go on."""
    experts = step.layer.experts
    if experts is None:
        raise MoesurgError(f"layer {step.index} has no experts")
    _, name = recast(step.module, experts.stock)
    kept: list[torch.Tensor] = []
    batch: Batch | None = None

    def begin(found: Batch) -> None:
        nonlocal batch
        batch = found

    def see(_: nn.Module, args: object, output: Any) -> None:
        if batch is None:
            raise MoesurgError(f"layer {step.index}: a batch was not announced")
        mixed_TD = output[0] if isinstance(output, tuple) else output
        real_TD = mixed_TD.reshape(-1, mixed_TD.shape[-1])[step.run.mask(batch).flatten()]
        low, high = np.searchsorted(sampled, (batch.start, batch.stop))
        rows = torch.from_numpy(sampled[low:high] - batch.start).to(real_TD.device)
        kept.append(real_TD[rows].float().cpu())

    step.module.get_submodule(name).register_forward_hook(see)
    step.advance(begin)
    return torch.cat(kept).numpy()
