"""The stock model run one decoder layer at a time, with memory for one layer.

transformers' own code computes everything. What a layer is given besides the hidden states (masks,
sliding windows, rotary embeddings) is recorded from the stock model's own forward with the layers
replaced, so that there is no family-specific code here. T counts tokens, D is the model width, V
the vocabulary, B the sequences of a batch.

    stream = LayerStream(model, reader)
    with stream.run(sequences) as run:
        for step in run.layers():        # the layer's weights are in step.module
            step.advance()               # all batches through it
        run.finish()                     # the final norm; run.states holds the result
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from ..architectures.model import Layer, Model
from ..checkpoint.reader import TensorReader
from ..errors import InputError, UsageError
from .sequences import Batch, Sequences
from .states import HiddenStates
from .stock import StockModel

EMBEDDING_ROWS = 1 << 14
"""Rows of the embedding that are read at a time."""

STATES_IN_MEMORY = 1 << 30
"""Bytes of hidden states above which they are mapped to a file."""


class LayerStream:
    """A model ready to be run layer by layer.

    Args:
        model: the checkpoint.
        reader: reads its weights.
        device: ``cpu`` or a CUDA device.
        dtype: what layers compute in; hidden states are kept in float32 between them.
        batch_tokens: most tokens of a batch, padding included.
        max_memory: bytes of hidden states above which they go to a temporary file.
        scratch: folder of that file; the system's temporary folder when None.

    Raises:
        UsageError: no such device.
        InputError: transformers does not accept the config.
    """

    def __init__(
        self,
        model: Model,
        reader: TensorReader,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = 4096,
        max_memory: int = STATES_IN_MEMORY,
        scratch: Path | None = None,
    ) -> None:
        self.model, self.reader = model, reader
        self.device = compute_device(device)
        self.batch_tokens, self.max_memory, self.scratch = batch_tokens, max_memory, scratch
        self.stock = StockModel(model, self.device, dtype)

    def stock_of(self, model: Model) -> StockModel:
        """Another model's stock classes, on the same device and in the same dtype."""
        return StockModel(model, self.device, self.stock.dtype)

    def run(self, sequences: Sequences) -> Run:
        """Embed the sequences; the layers follow.

        Raises:
            InputError: a token id is not below the vocabulary size.
            RefusedError: no disk space for the hidden states.
        """
        return Run(self, sequences)

    def head(self) -> Head:
        """The output head, tied or not."""
        return Head(self.model, self.reader, self.device)


class Run:
    """Sequences on their way through a model.

    Attributes:
        batches: in the order of the states.
        states: the hidden states after the last finished layer.
    """

    def __init__(self, stream: LayerStream, sequences: Sequences) -> None:
        self.stream, self.sequences = stream, sequences
        self.batches = sequences.batches(stream.batch_tokens)
        self.states = HiddenStates(
            sequences.total,
            stream.model.config.hidden,
            max_memory=stream.max_memory,
            scratch=stream.scratch,
        )
        self._embed()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        del self.states

    def layers(self) -> Iterator[Step]:
        """The decoder layers in order, weights loaded; advanced where the caller did not."""
        for layer in self.stream.model.layers:
            module = self.stream.stock.layer(layer.index, self.stream.reader)
            step = Step(self, layer, module)
            del module  # the step alone holds the weights, so that they go with it
            yield step
            if not step.advanced:
                step.advance()
            step.release()

    def finish(self) -> None:
        """Apply the final norm to all states."""
        norm = self.stream.stock.final_norm(self.stream.reader)
        for batch in self.batches:
            rows_ND = self.states.packed_TD[batch.start : batch.stop]
            at = rows_ND.to(device=self.stream.device, dtype=self.stream.stock.dtype)
            self.states.store(batch.start, batch.stop, norm(at))

    def mask(self, batch: Batch) -> torch.Tensor:
        """Where a batch has real tokens: bool [B, T] on the device."""
        return torch.from_numpy(batch.mask_BT).to(self.stream.device)

    def _embed(self) -> None:
        model, reader, stock = self.stream.model, self.stream.reader, self.stream.stock
        region = model.whole(model.family.embedding)
        ids_T = torch.cat([torch.from_numpy(batch.ids_BT[batch.mask_BT]) for batch in self.batches])
        vocab = region.shape[0]
        low, high = int(ids_T.min()), int(ids_T.max())
        if low < 0 or high >= vocab:
            raise InputError(
                f"{model.folder}: token id {low if low < 0 else high} is not in its vocabulary "
                f"of {vocab}",
                hint="the token ids come from another tokenizer",
            )
        for start in range(0, vocab, EMBEDDING_ROWS):
            stop = min(start + EMBEDDING_ROWS, vocab)
            here_T = (ids_T >= start) & (ids_T < stop)
            if bool(here_T.any()):
                rows_VD = reader.read(region.rows(start, stop)).float()
                self.states.packed_TD[here_T] = rows_VD[ids_T[here_T] - start]
        for batch in self.batches:
            mask_BT = self.mask(batch)
            embedded_BTD = self.states.padded(batch.start, batch.stop, mask_BT, dtype=stock.dtype)
            first_BTD = stock.enter(embedded_BTD, mask_BT)
            self.states.store(batch.start, batch.stop, first_BTD[mask_BT])


class Step:
    """One decoder layer with its weights, between the states before and after it.

    A method that operates layer by layer changes ``module`` (see ``replace_experts``) and then
    advances; it may call :meth:`forward` before, any number of times, on the same inputs.

    Attributes:
        layer: facts on the layer.
        module: the stock decoder layer.
        advanced: whether the states are already those after the layer.
    """

    def __init__(self, run: Run, layer: Layer, module: nn.Module) -> None:
        self.run, self.layer, self.module = run, layer, module
        self.advanced = False

    @property
    def index(self) -> int:
        return self.layer.index

    def forward(self, batch: Batch) -> torch.Tensor:
        """The layer's output for a batch: [B, T, D] on the device. The states stay as they are."""
        stock = self.run.stream.stock
        mask_BT = self.run.mask(batch)
        hidden_BTD = self.run.states.padded(batch.start, batch.stop, mask_BT, dtype=stock.dtype)
        args, kwargs = stock.call(self.index, hidden_BTD, mask_BT, batch.lengths)
        with torch.no_grad():
            output = self.module(hidden_BTD, *args, **kwargs)
        output_BTD: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return output_BTD

    def observe(self, before: Callable[[Batch], None]) -> None:
        """Run all batches for what hooks see; ``before`` is told each one. The states stay."""
        for batch in self.run.batches:
            before(batch)
            self.forward(batch)

    def advance(self, before: Callable[[Batch], None] | None = None) -> None:
        """Run all batches and keep the outputs as the states after this layer.

        Raises:
            InputError: an output is not finite.
        """
        for batch in self.run.batches:
            if before is not None:
                before(batch)
            rows_ND = self.forward(batch)[self.run.mask(batch)]
            if not bool(torch.isfinite(rows_ND).all()):
                raise InputError(
                    f"{self.run.stream.model.folder}: layer {self.index} gives values that are "
                    "not finite on this text",
                    hint="the weights are damaged, or too large for the compute dtype",
                )
            self.run.states.store(batch.start, batch.stop, rows_ND)
        self.advanced = True

    def release(self) -> None:
        """Drop the weights."""
        self.module = nn.Identity()


class Head:
    """The output head, its weight [V, D] held in float32.

    Args:
        model: the checkpoint; a tied head is the embedding.
    """

    def __init__(self, model: Model, reader: TensorReader, device: torch.device) -> None:
        name = model.family.embedding if model.config.tied else model.family.head
        region = model.whole(name)
        self.vocab = region.shape[0]
        self.divisor = model.family.logits_divisor(model.config)
        self.bias_V: torch.Tensor | None = None
        if model.family.head_bias(model.config):
            bias_V = reader.read(model.whole(model.family.head_bias_name))
            self.bias_V = bias_V.to(device=device, dtype=torch.float32)
        self.weight_VD = torch.empty(region.shape, dtype=torch.float32, device=device)
        for start in range(0, self.vocab, EMBEDDING_ROWS):
            stop = min(start + EMBEDDING_ROWS, self.vocab)
            self.weight_VD[start:stop].copy_(reader.read(region.rows(start, stop)))

    def __call__(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, V] of normalised states [T, D]; call it on blocks of tokens."""
        logits_TV = hidden_TD.to(self.weight_VD) @ self.weight_VD.T
        if self.bias_V is not None:
            logits_TV = logits_TV + self.bias_V
        return logits_TV if self.divisor == 1.0 else logits_TV / self.divisor


def compute_device(name: str) -> torch.device:
    """A device that torch can use and that has float64.

    Raises:
        UsageError: there is none of this name.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device: expected cpu or cuda[:N], found {name!r}") from None
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"--device: expected cpu or cuda[:N], found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device: {name!r} is not there ({torch.cuda.device_count()} CUDA devices)",
            hint="use --device cpu",
        )
    return device
