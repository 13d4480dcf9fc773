"""Gram matrices of a model's inputs before and after it is compressed, layer by layer as it is compressed.

Two streams of hidden states pass through every layer: the original model's, and those of a model whose linear layers
before the one in question are already replaced, within the layer too. For inputs X of the first and Y of the second,
Y^T Y and X^T Y of each batch are added up in float64 and stored in float32; from these, the method makes the matrix
that the second stream goes on with. Linear layers that are given one tensor share their matrices and are replaced
together.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures.model import Model
from ..checkpoint.reader import TensorReader
from ..errors import InputError, MoesurgError
from ..linalg.lowrank import product
from ..plan import Unit
from .forward import STATES_IN_MEMORY, LayerStream, Step
from .gram_folder import SCHEMA_VERSION, ShiftedGrams, layer_file
from .sequences import Batch, Sequences
from .shifted_experts import ShiftedExperts, by_layer

Sink = Callable[[str, bytes], None]
Replacement = Callable[[Unit, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From a unit, its matrix W, Y^T Y and X^T Y to the matrix in its place."""


class _Enough(Exception):
    """Ends a forward whose input has been seen."""


class _Tap:
    """Reads what one linear layer of a decoder layer is given, and stops there."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen: torch.Tensor | None = None

    def groups(self, batch: Batch) -> list[list[str]]:
        """Names of the linear layers in the order of their calls; those given one tensor together."""
        found: list[tuple[torch.Tensor, list[str]]] = []

        def hook(name: str) -> Any:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                for given, names in found:
                    if given is args[0]:
                        names.append(name)
                        return
                found.append((args[0], [name]))

            return see

        handles = [
            part.register_forward_pre_hook(hook(name))
            for name, part in self._step.module.named_modules()
            if isinstance(part, nn.Linear)
        ]
        self._step.forward(batch)
        for handle in handles:
            handle.remove()
        return [names for _, names in found]

    def rows(self, name: str, batch: Batch) -> torch.Tensor:
        """Inputs [T, N] of a linear layer on the real tokens of a batch.

        Raises:
            InputError: one is not finite.
        """

        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._seen = args[0]
            raise _Enough

        handle = self._step.module.get_submodule(name).register_forward_pre_hook(see)
        try:
            self._step.forward(batch)
        except _Enough:
            pass
        finally:
            handle.remove()
        if self._seen is None:
            raise MoesurgError(f"layer {self._step.index}: the stock forward does not call {name}")
        mask_BT = self._step.run.mask(batch)
        rows_TN = self._seen.reshape(-1, self._seen.shape[-1])[mask_BT.flatten()]
        self._seen = None
        if not bool(torch.isfinite(rows_TN).all()):
            raise InputError(
                f"layer {self._step.index}: the inputs of {name} are not finite on this text",
                hint="the weights are damaged, or the compression is too strong",
            )
        return rows_TN


def collect_shifted(
    model: Model,
    reader: TensorReader,
    sequences: Sequences,
    sink: Sink,
    units: Sequence[Unit],
    replacement: Replacement,
    *,
    device: str = "cpu",
    max_memory: int = STATES_IN_MEMORY,
    scratch: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, object]:
    """Run the text through both models and hand every layer's file to ``sink``.

    Args:
        units: transforms of linear layers name their module in ``params["input"]``, those of experts ``expert`` and
            ``role`` too; others are not looked at.

    Returns:
        The manifest, JSON values, without the model's digest.

    Raises:
        InputError: a value is not finite.
    """
    wanted: dict[int | None, dict[str, Unit]] = {}
    made = [unit for unit in units if unit.kind == "transform"]
    for unit in made:
        if "expert" not in unit.params:
            wanted.setdefault(unit.layer, {})[unit.params["input"]] = unit
    experts = by_layer(unit for unit in made if "expert" in unit.params)
    from safetensors.torch import save

    streams = [
        LayerStream(model, reader, device=device, max_memory=max_memory, scratch=scratch)
        for _ in range(2)
    ]
    layers: dict[str, object] = {}
    with streams[0].run(sequences) as first, streams[1].run(sequences) as second:
        for one, other in zip(first.layers(), second.layers(), strict=True):
            here = wanted.get(one.index, {})
            stored, source, rows = _layer(one, other, here, replacement)
            if one.index in experts:
                mixture = ShiftedExperts(one, other)
                mixture.collect(experts[one.index], replacement)
                stored |= mixture.stored
                rows |= mixture.rows
                source |= {name: name for name in mixture.stored}
            data = save(stored)
            sink(layer_file(one.index), data)
            layers[str(one.index)] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                "source": source,
                "rows": rows,
            }
            one.advance()
            other.advance()
            if progress is not None:
                progress("layer", one.index + 1, len(model.layers))
    return {
        "schema_version": SCHEMA_VERSION,
        "mode": ShiftedGrams.mode,
        "model_type": model.family.model_type,
        "hidden": model.config.hidden,
        "layers": layers,
        "text": sequences.manifest(),
        "device": streams[0].device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        },
    }


def _layer(
    one: Step, other: Step, wanted: dict[str, Unit], replacement: Replacement
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, int]]:
    """A layer's matrices, the one every module's inputs are stored under, and how many inputs each sums."""
    before, after = _Tap(one), _Tap(other)
    stored: dict[str, torch.Tensor] = {}
    source: dict[str, str] = {}
    rows: dict[str, int] = {}
    batches = one.run.batches
    for group in before.groups(batches[0]) if wanted else []:
        here = [name for name in group if name in wanted]
        if not here:
            continue
        name, count = here[0], 0
        gram_NN = cross_NN = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            x_TN, y_TN = before.rows(name, batch), after.rows(name, batch)
            gram_NN = gram_NN + product(y_TN, y_TN)
            cross_NN = cross_NN + product(x_TN, y_TN)
            count += len(y_TN)
        stored[name] = ((gram_NN + gram_NN.T) / 2).float().cpu().contiguous()
        stored[f"{name}.cross"] = cross_NN.float().cpu().contiguous()
        for member in here:
            source[member], source[f"{member}.cross"] = name, f"{name}.cross"
            weight: Any = other.module.get_submodule(member).weight
            # From the stored matrices, as the run's unit will make it.
            new = replacement(
                wanted[member], weight.data.cpu(), stored[name], stored[f"{name}.cross"]
            )
            weight.data.copy_(new)
        rows[name] = rows[f"{name}.cross"] = count
    missing = set(wanted) - set(source)
    if missing:
        raise MoesurgError(
            f"layer {one.index}: the stock forward does not call {sorted(missing)[0]}"
        )
    return stored, source, rows
