"""The Gram matrix C = X^T X of what every linear layer of a model is given on a text.

Layers that are given the same tensor (query, key and value; gate and up) share one matrix, found out from the
stock forward itself. All experts of a mixture share the mixture's input; each expert's down projection has the
matrix of its own hidden activations on the tokens that select it. Sums are float64; they are stored in float32,
whose rounding is relative to each element and so to the scale of each channel.

A folder holds ``statistics.json`` and one ``gram.<layer>.safetensors`` a layer, written as the layer ends.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures.linears import Linear, expert_input, linears
from ..architectures.model import Layer, Model
from ..checkpoint.reader import TensorReader
from ..errors import InputError, MoesurgError
from .blocks import recast
from .forward import STATES_IN_MEMORY, LayerStream, Step
from .gram_folder import JSON_FILE, SCHEMA_VERSION, layer_file
from .sequences import Batch, Sequences

Progress = Callable[[str, int, int], None]
Sink = Callable[[str, bytes], None]
"""Takes the name and the bytes of a finished file."""


class LayerGrams:
    """What one decoder layer adds up while its batches pass.

    Attributes:
        totals: matrices by the name of the input.
        rows: how many inputs each is the sum of.
        source: for every linear module the name of its input.
    """

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer, self.device = layer, device
        self.totals: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}
        self.source: dict[str, str] = {}
        self.real_T: torch.Tensor = torch.ones(0, dtype=torch.bool)
        self._seen: list[tuple[torch.Tensor, str]] = []

    def attach(self, module: nn.Module) -> None:
        """Put hooks on the linear layers of a materialised decoder layer, and stand in for its experts."""
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(self._hook(name))
        experts = self.layer.experts
        if experts is not None:
            _, place = recast(module, experts.stock)
            scaled = experts.stock.call == "scaled"
            stand_in = _Experts(module.get_submodule(place), self, scaled=scaled)
            module.set_submodule(place, stand_in)
            for expert in range(experts.count):
                self._start(expert_input(expert), experts.width)
            self._start(expert_input(), experts.hidden)

    def begin(self, batch: Batch) -> None:
        """Tell which batch comes next."""
        self.real_T = torch.from_numpy(batch.mask_BT).flatten().to(self.device)
        self._seen = []

    def add(self, name: str, rows_ND: torch.Tensor) -> None:
        """Inputs of one kind."""
        if name not in self.totals:
            self._start(name, rows_ND.shape[1])
        wide_ND = rows_ND.double()
        self.totals[name].addmm_(wide_ND.T, wide_ND)
        self.rows[name] += len(rows_ND)

    def file(self) -> bytes:
        """The layer's file.

        Raises:
            InputError: an input was not finite.
        """
        from safetensors.torch import save

        found = {}
        for name, total in self.totals.items():
            found[name] = ((total + total.T) / 2).float().cpu().contiguous()
            if not bool(torch.isfinite(found[name]).all()):
                raise InputError(
                    f"layer {self.layer.index}: the inputs of {name} are not finite on this text, or too large",
                    hint="the weights are damaged",
                )
        return save(found)

    def _start(self, name: str, size: int) -> None:
        self.totals[name] = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        self.rows[name] = 0

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            given: torch.Tensor = args[0]
            if self.source.get(name, name) != name:
                return  # shares an input that is counted under another name
            for other, source in self._seen:
                if other is given:
                    self.source[name] = source
                    return
            self.source[name] = name
            self._seen.append((given, name))
            flat_ND = given.reshape(-1, given.shape[-1])
            if len(flat_ND) != len(self.real_T):
                raise MoesurgError(
                    f"layer {self.layer.index}: {name} is not given one row per token"
                )
            self.add(name, flat_ND[self.real_T])

        return see


class _Experts(nn.Module):
    """Stands for the stock experts, computes what they do and sees what goes into each matrix.

    Args:
        scaled: inputs are multiplied by the weights, not outputs; what is seen are the multiplied ones.
    """

    def __init__(self, stock: nn.Module, grams: LayerGrams, *, scaled: bool) -> None:
        super().__init__()
        self.stock: Any = stock
        self.grams, self.scaled = grams, scaled

    def forward(
        self, input_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        real_T = self.grams.real_T
        if not self.scaled:
            self.grams.add(expert_input(), input_TD[real_T])
        mixed_TD = torch.zeros_like(input_TD)
        for expert in torch.unique(index_TK).tolist():
            slot_N, token_N = torch.where(expert == index_TK.T)
            weight_N1, given_ND = weight_TK[token_N, slot_N, None], input_TD[token_N]
            if self.scaled:
                given_ND = given_ND * weight_N1
                self.grams.add(expert_input(), given_ND[real_T[token_N]])
                weight_N1 = torch.ones_like(weight_N1)
            both_N2F = nn.functional.linear(given_ND, self.stock.gate_up_proj[expert])
            gate_NF, up_NF = both_N2F.chunk(2, -1)
            hidden_NF = self.stock.act_fn(gate_NF) * up_NF
            self.grams.add(expert_input(expert), hidden_NF[real_T[token_N]])
            output_ND = nn.functional.linear(hidden_NF, self.stock.down_proj[expert])
            weighted_ND = output_ND * weight_N1
            mixed_TD.index_add_(0, token_N, weighted_ND.to(mixed_TD.dtype))
        return mixed_TD


def collect_grams(
    model: Model,
    reader: TensorReader,
    sequences: Sequences,
    sink: Sink,
    *,
    device: str = "cpu",
    max_memory: int = STATES_IN_MEMORY,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Run the text through the model and hand every layer's file to ``sink``.

    Returns:
        The manifest, JSON values, without the model's digest.

    Raises:
        InputError: a value is not finite.
    """
    stream = LayerStream(model, reader, device=device, max_memory=max_memory, scratch=scratch)
    wanted: dict[int, list[Linear]] = {}
    for linear in linears(model):
        wanted.setdefault(linear.layer, []).append(linear)
    layers: dict[str, object] = {}
    with stream.run(sequences) as run:
        for step in run.layers():
            grams = _observe(step, stream.device)
            data = grams.file()
            sink(layer_file(step.index), data)
            layers[str(step.index)] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "source": _sources(wanted.get(step.index, []), grams),
                "rows": grams.rows,
            }
            if progress is not None:
                progress("layer", step.index + 1, len(model.layers))
    return {
        "schema_version": SCHEMA_VERSION,
        "mode": "gram",
        "model_type": model.family.model_type,
        "hidden": model.config.hidden,
        "layers": layers,
        "text": sequences.manifest(),
        "device": stream.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
    }


def manifest_file(manifest: Mapping[str, object]) -> tuple[str, bytes]:
    """Name and bytes of a folder's manifest."""
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return JSON_FILE, text.encode()


def _observe(step: Step, device: torch.device) -> LayerGrams:
    grams = LayerGrams(step.layer, device)
    grams.attach(step.module)
    step.advance(grams.begin)
    return grams


def _sources(wanted: list[Linear], grams: LayerGrams) -> dict[str, str]:
    """For every input that the layer's linear layers name, the matrix it is stored under."""
    found = {}
    for linear in wanted:
        name = grams.source.get(linear.module, linear.module)
        if name not in grams.totals:
            raise MoesurgError(f"{linear.label}: the stock forward does not call {linear.module}")
        found[linear.module] = name
    return found
