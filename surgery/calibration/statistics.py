"""The statistics of a model on a text: what calibration writes and every method reads. Needs no
torch.

A folder holds ``statistics.json`` (what was run on what) and ``statistics.safetensors``: for every
MoE layer and domain the fields of `layer_statistics.py`, and what was optionally kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ..checkpoint.header import TensorInfo, read_header, read_json
from ..checkpoint.reader import Checkpoint, contained, file_digest
from ..errors import InputError
from .layer_statistics import (
    ALL_EXPERT,
    HALVES,
    MAXIMA,
    OPTIONAL,
    ROUTED,
    LayerStatistics,
    shape_of,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..architectures.model import Model

__all__ = ["LayerStatistics", "Statistics", "model_digest"]

SCHEMA_VERSION = 1
JSON_FILE = "statistics.json"
TENSOR_FILE = "statistics.safetensors"


def refuse_another(
    folder: Path, manifest: Mapping[str, Any], expected: Mapping[str, object], command: str
) -> None:
    """Raise InputError, naming what differs, where a manifest does not tell what is expected of a model.

    Args:
        command: that makes a fitting folder.
    """
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise InputError(
                f"{folder}: statistics of another model ({key}: expected {value}, "
                f"found {manifest.get(key)})",
                hint=f"rerun moesurg {command}",
            )


def model_digest(checkpoint: Checkpoint, known: Mapping[Path, str] | None = None) -> str:
    """SHA-256 over the digests of config.json and all weight files.

    Args:
        known: digests of files that were computed already; the others are read whole.
    """
    state = hashlib.sha256()
    for path in (contained(checkpoint.folder, "config.json"), *checkpoint.files):
        digest = (known or {}).get(path) or file_digest(path)
        state.update(f"{path.name}\0{digest}\n".encode())
    return state.hexdigest()


class Statistics:
    """A statistics folder. Layers are read when asked for."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, object],
        tensors: Mapping[str, TensorInfo],
    ) -> None:
        self.folder, self.manifest, self._tensors = folder, manifest, tensors
        self.mode = self._text("mode")
        self.model_type = self._text("model_type")
        self.experts = self._count("experts")
        self.hidden = self._count("hidden")
        self.layers: list[int] = self._layers()
        self.domains = self._domains()
        for layer in self.layers:
            for domain in self.domains:
                for field in (*ROUTED, *(ALL_EXPERT if self.mode == "all" else ())):
                    self._info(f"layers.{layer}.{domain}.{field}", field)

    @classmethod
    def open(cls, folder: Path) -> Statistics:
        """Open and validate a folder that ``moesurg calibrate`` made.

        Raises:
            InputError: no such folder, another schema, or something missing in it.
        """
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder of statistics", hint="make one with moesurg calibrate"
            )
        manifest = read_json(contained(folder, JSON_FILE))
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{folder / JSON_FILE}: expected schema_version {SCHEMA_VERSION}, found "
                f"{manifest.get('schema_version')!r}",
                hint="rerun moesurg calibrate with this version",
            )
        if manifest.get("mode") == "gram":
            raise InputError(
                f"{folder}: holds Gram matrices of linear layers, not statistics of experts",
                hint="rerun calibrate without --linear-grams",
            )
        return cls(folder, manifest, read_header(contained(folder, TENSOR_FILE)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over both files, for fingerprints and reports."""
        parts = [file_digest(self.folder / name) for name in (JSON_FILE, TENSOR_FILE)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def layer(self, index: int, domains: Sequence[str] | None = None) -> LayerStatistics:
        """One layer's sums over some domains, all of them by default.

        Raises:
            InputError: no such layer or domain, or a value is not finite.
        """
        import numpy as np

        if index not in self.layers:
            raise InputError(
                f"{self.folder}: has no statistics of layer {index}, only of {self.layers}"
            )
        chosen = list(dict.fromkeys(self.domains if domains is None else domains))
        for domain in chosen:
            if domain not in self.domains:
                raise InputError(
                    f"{self.folder}: has no domain {domain!r}",
                    hint=f"its domains are {', '.join(self.domains)}",
                )
        if not chosen:
            raise InputError(f"{self.folder}: no domain was chosen")
        found: dict[str, NDArray[np.float64]] = {}
        for field in (*ROUTED, *ALL_EXPERT, *OPTIONAL):
            names = [f"layers.{index}.{domain}.{field}" for domain in chosen]
            if names[0] not in self._tensors:
                continue
            parts = [self._read(self._info(name, field)) for name in names]
            stacked = np.stack(parts)
            found[field] = stacked.max(axis=0) if field in MAXIMA else stacked.sum(axis=0)
        tokens = float(found.pop("tokens"))
        return LayerStatistics(index, tokens, **found)

    @property
    def has_halves(self) -> bool:
        """Whether sums over every second sequence were kept."""
        return f"halves.{self.layers[0]}.{self.domains[0]}.tokens" in self._tensors

    @property
    def has_trace(self) -> bool:
        """Whether the selections of every token were kept."""
        return f"trace.{self.layers[0]}" in self._tensors

    def half(self, index: int, which: Literal[0, 1]) -> LayerStatistics:
        """One layer's sums by expert over one half of the sequences of all domains.

        The fields that are not summed by halves hold NaN, so that nothing can be computed from them unnoticed.

        Raises:
            InputError: the folder has no halves.
        """
        import numpy as np

        whole, found = self.layer(index), {}
        for field in (*ROUTED, *ALL_EXPERT, *OPTIONAL):
            found[field] = np.full(shape_of(field, self.experts, self.hidden), np.nan)
        for field in HALVES:
            names = [f"halves.{index}.{domain}.{field}" for domain in self.domains]
            if names[0] not in self._tensors:
                raise InputError(
                    f"{self.folder}: has no sums over half of the text",
                    hint="rerun moesurg calibrate with this version",
                )
            second = np.sum([self._read(self._info(name, field)) for name in names], axis=0)
            found[field] = second if which else getattr(whole, field) - second
        return LayerStatistics(index, float(found.pop("tokens")), **found)

    def inputs(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Sampled inputs of a layer's mixture: rows [N, D] and their token ids [N], the same in all
        layers.

        Raises:
            InputError: calibration kept none.
        """
        rows, ids = self._optional(f"inputs.{layer}", "inputs.token_ids", flag="--inputs N")
        return rows, ids

    def inputs_shape(self, layer: int) -> tuple[int, int]:
        """How many sampled inputs a layer has, and their width; nothing is read.

        Raises:
            InputError: calibration kept none, or of another width.
        """
        name = f"inputs.{layer}"
        if name not in self._tensors:
            raise InputError(
                f"{self.folder}: has no {name}", hint="rerun moesurg calibrate with --inputs N"
            )
        shape = self._tensors[name].shape
        if len(shape) != 2 or shape[1] != self.hidden:
            raise InputError(f"{self.folder / TENSOR_FILE}: {name!r} has shape {list(shape)}")
        return shape[0], shape[1]

    def energies(self, layer: int) -> NDArray[np.float64]:
        """Squared norms of the hidden states after a layer of the tokens of :meth:`inputs`, [N].

        Raises:
            InputError: calibration kept none.
        """
        (found,) = self._optional(f"energies.{layer}", flag="--inputs N and this version")
        return found

    def targets(self, layer: int) -> NDArray[np.float32] | None:
        """The original mixture's outputs for the tokens of :meth:`inputs` [N, D], None where those are its inputs."""
        info = self._tensors.get(f"targets.{layer}")
        return None if info is None else self._read(info)

    def trace(
        self, layer: int
    ) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64], NDArray[np.int64]]:
        """Selected experts of every token [T, K], with the length and domain index of every
        sequence.

        The rows of one sequence follow each other; K is in the router's order, strongest first.

        Raises:
            InputError: calibration kept none.
        """
        ids, lengths, domains = self._optional(
            f"trace.{layer}", "sequences.lengths", "sequences.domains", flag="--trace"
        )
        return ids, lengths, domains

    def check_model(self, model: Model, digest: str | None = None) -> None:
        """Refuse statistics of another model.

        Args:
            digest: the model's :func:`model_digest` where the caller has it; without it only the
                family, the sizes and the layers are compared.

        Raises:
            InputError: naming what differs.
        """
        found = {
            "model_type": model.family.model_type,
            "experts": model.experts,
            "top_k": model.rule.top_k,
            "hidden": model.config.hidden,
            "layers": [layer.index for layer in model.moe_layers],
        }
        if digest is not None:
            found["model_sha256"] = digest
        refuse_another(self.folder, self.manifest, found, f"calibrate on {model.folder}")

    def _optional(self, *names: str, flag: str) -> tuple[NDArray[Any], ...]:
        for name in names:
            if name not in self._tensors:
                raise InputError(
                    f"{self.folder}: has no {name}", hint=f"rerun moesurg calibrate with {flag}"
                )
        return tuple(self._read(self._tensors[name]) for name in names)

    def _info(self, name: str, field: str) -> TensorInfo:
        expected = shape_of(field, self.experts, self.hidden)
        info = self._tensors.get(name)
        if info is None or info.dtype != "F64" or info.shape != expected:
            found = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise InputError(
                f"{self.folder / TENSOR_FILE}: expected {name!r} as F64 {list(expected)}, "
                f"found {found}"
            )
        return info

    def _read(self, info: TensorInfo) -> NDArray[Any]:
        import numpy as np

        kinds = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "U8": "|u1", "U16": "<u2"}
        if info.dtype not in kinds:
            raise InputError(f"{info.file}: tensor {info.name!r} has type {info.dtype}")
        with info.file.open("rb") as file:
            file.seek(info.begin)
            data = file.read(info.nbytes)
        if len(data) != info.nbytes:
            raise InputError(f"{info.file}: ended inside tensor {info.name!r}")
        array = np.frombuffer(data, kinds[info.dtype]).reshape(info.shape)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{info.file}: tensor {info.name!r} has a value that is not finite")
        return array

    def _text(self, key: str) -> str:
        value = self.manifest.get(key)
        if not isinstance(value, str):
            raise InputError(f"{self.folder / JSON_FILE}: {key} should be text, is {value!r}")
        return value

    def _count(self, key: str) -> int:
        value = self.manifest.get(key)
        if type(value) is not int or value < 1:
            raise InputError(
                f"{self.folder / JSON_FILE}: {key} should be a positive integer, is {value!r}"
            )
        return value

    def _layers(self) -> list[int]:
        value = self.manifest.get("layers")
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise InputError(f"{self.folder / JSON_FILE}: layers should be a list, is {value!r}")
        return value

    def _domains(self) -> list[str]:
        text = self.manifest.get("text")
        listed = text.get("domains") if isinstance(text, dict) else None
        if not isinstance(listed, list) or not listed:
            raise InputError(f"{self.folder / JSON_FILE}: text.domains is missing or empty")
        names = [item.get("name") if isinstance(item, dict) else None for item in listed]
        if not all(isinstance(name, str) for name in names):
            raise InputError(f"{self.folder / JSON_FILE}: a domain of text.domains has no name")
        return cast("list[str]", names)
