"""A PEFT adapter seen as modules with two factors each, instead of tensor names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..checkpoint.dtypes import FLOATING
from ..checkpoint.formats import ADAPTER
from ..checkpoint.reader import Checkpoint, open_checkpoint
from ..checkpoint.region import Region
from ..errors import InputError
from .config import AdapterConfig

PREFIX = "base_model.model."
"""Before every name in an adapter's file."""

Kind = Literal["linear", "embedding", "convolution", "experts"]

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)"
)


@dataclass(frozen=True)
class Module:
    """One adapted module: its weight changes by ``scale * B A``.

    Attributes:
        name: path of the module in the base, without the prefix of the file. Of two targeted parameters of one
            module, PEFT wraps one in the other, which shows as a final ``base_layer``.
        kind: ``linear`` (also Conv1D: the same factors, applied transposed), ``embedding``, ``convolution``,
            or ``experts``: stacked experts, each with factors of its own.
        down: factor A as stored: [r, in]; convolution [r, in, k...]; embedding [r, vocabulary]; experts [E r, in].
        up: factor B as stored: [out, r]; convolution [out, r, 1...]; embedding [dim, r]; experts [out, r E].
        bias: of B [out], which is scaled like the product, or None.
        rank: r, of one expert where there are several.
        scale: what the product is multiplied by.
        experts: E, 1 for everything else.
    """

    name: str
    kind: Kind
    down: Region
    up: Region
    bias: Region | None
    rank: int
    scale: float
    experts: int = 1

    @property
    def inputs(self) -> int:
        """Columns of A, flattened."""
        count = 1
        for size in self.down.shape[1:]:
            count *= size
        return count

    @property
    def outputs(self) -> int:
        """Rows of B."""
        return self.up.shape[0]

    @property
    def shape(self) -> tuple[object, ...]:
        """What two adapters must share to be combined: everything but rank and scale."""
        return (self.kind, self.experts, self.outputs, *self.down.shape[1:], *self.up.shape[2:])


class Adapter:
    """A validated adapter folder. Holds no weight."""

    label = "adapter"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = AdapterConfig(checkpoint.config, str(checkpoint.folder / ADAPTER.config))
        self.modules, self.full = self._modules()

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Open and validate a folder: every tensor is a factor with its partner, or one the config announces.

        Raises:
            InputError: naming the first thing that differs, with file, tensor or key.
        """
        return cls(open_checkpoint(folder, ADAPTER))

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @cached_property
    def dtypes(self) -> list[str]:
        """Stored types of the factors, sorted."""
        regions = [
            region for module in self.modules.values() for region in (module.down, module.up)
        ]
        return sorted({self.checkpoint.tensors[region.tensor].dtype for region in regions})

    def _modules(self) -> tuple[dict[str, Module], dict[str, Region]]:
        factors: dict[str, dict[str, Region]] = {}
        full: dict[str, Region] = {}
        for name, info in self.checkpoint.tensors.items():
            if not name.startswith(PREFIX):
                raise InputError(
                    f"{info.file}: tensor {name!r} does not begin with {PREFIX!r}, as PEFT's names do"
                )
            if info.dtype not in FLOATING:
                raise InputError(
                    f"{info.file}: tensor {name!r} is stored as {info.dtype}, expected one of "
                    f"{', '.join(sorted(FLOATING))}"
                )
            short, region = name.removeprefix(PREFIX), Region(name, info.shape)
            found = _FACTOR.fullmatch(short)
            if found:
                factors.setdefault(found["module"], {})[found["part"]] = region
            elif self._announced(short):
                full[short] = region
            else:
                raise self._unknown(name, short)
        if not factors:
            raise InputError(f"{self.folder}: holds no low-rank factors")
        return {module: self._module(module, factors[module]) for module in sorted(factors)}, full

    def _announced(self, name: str) -> bool:
        """Whether a tensor is part of a module that is saved in full."""
        module = name.rpartition(".")[0]
        return any(module == saved or module.endswith("." + saved) for saved in self.config.saved)

    def _unknown(self, name: str, short: str) -> InputError:
        reason = "is neither a factor nor part of a module that modules_to_save lists"
        if short.endswith("lora_magnitude_vector"):
            reason = "belongs to DoRA, whose change of the weight is no product of factors"
        elif ".base_layer." in short:
            reason = (
                "is a weight of the base model; save the adapter with save_embedding_layers=False"
            )
        elif "trainable_tokens" in short:
            reason = "holds trained token embeddings, which are no product of factors"
        return InputError(f"{self.folder}: tensor {name!r} {reason}")

    def _module(self, name: str, parts: Mapping[str, Region]) -> Module:
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        keys = (
            ("lora_embedding_A", "lora_embedding_B")
            if embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        for key, other in (keys, keys[::-1]):
            if key not in parts:
                raise InputError(f"{self.folder}: module {name} has {other} but no {key}")
        down, up, bias = parts[keys[0]], parts[keys[1]], parts.get("lora_B.bias")
        if (bias is not None) != (self.config.lora_bias and not embedding):
            raise InputError(
                f"{self.folder}: module {name} {'has' if bias else 'lacks'} lora_B.bias, "
                f"and lora_bias is {self.config.lora_bias}"
            )
        if len(down.shape) < 2 or len(up.shape) != len(down.shape):
            raise self._shapes(name, down, up)
        rank, stacked = self.config.rank_of(name), self._stacked(name)
        experts = 1
        if stacked:
            experts, rest = divmod(down.shape[0], rank)
            if rest or up.shape[1] != experts * rank or len(down.shape) != 2:
                raise self._shapes(name, down, up)
        elif down.shape[0] != rank or up.shape[1] != rank:
            raise InputError(
                f"{self.folder}: module {name}: factors {list(down.shape)} and {list(up.shape)} are not of the rank "
                f"{rank} that {ADAPTER.config} gives it"
            )
        if any(size != 1 for size in up.shape[2:]):
            raise self._shapes(name, down, up)
        if bias is not None and bias.shape != up.shape[:1]:
            raise InputError(
                f"{self.folder}: module {name}: lora_B.bias is {list(bias.shape)}, expected [{up.shape[0]}]"
            )
        kind: Kind = "linear"
        if embedding:
            kind = "embedding"
        elif len(down.shape) > 2:
            kind = "convolution"
        elif stacked:
            kind = "experts"
        scale = self.config.scale_of(name, rank)
        return Module(name, kind, down, up, bias, rank, scale, experts)

    def _stacked(self, name: str) -> bool:
        """Whether a module's factors are those of a targeted parameter."""
        module = name.removesuffix(".base_layer")
        for parameter in self.config.parameters:
            owner = parameter.rpartition(".")[0]
            if owner and (module == owner or module.endswith("." + owner)):
                return True
        return False

    def _shapes(self, name: str, down: Region, up: Region) -> InputError:
        return InputError(
            f"{self.folder}: module {name}: factors of shapes {list(down.shape)} and {list(up.shape)} do not belong "
            "together"
        )
