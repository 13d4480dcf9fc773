"""A folder of Gram matrices as methods read it, and where a run gets one from. Needs no torch to open."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..architectures.linears import linears
from ..checkpoint.header import read_header, read_json
from ..checkpoint.reader import Checkpoint, TensorReader, contained, file_digest
from ..checkpoint.region import Region
from ..errors import InputError, RefusedError, as_written
from .sources import Fresh, Given, Origin, keep_folder
from .statistics import JSON_FILE, SCHEMA_VERSION, refuse_another

if TYPE_CHECKING:
    import torch

    from ..architectures.model import Model
    from ..checkpoint.commit import Staging
    from ..plan import Unit
    from ..progress import Progress, Stop

__all__ = ["JSON_FILE", "SCHEMA_VERSION", "FreshGrams", "GivenGrams", "Grams", "layer_file"]


def layer_file(layer: int) -> str:
    """The file of one layer's matrices."""
    return f"gram.{layer}.safetensors"


class Grams:
    """A folder that `grams.py` wrote. Matrices are read when asked for."""

    mode = "gram"

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._layers: Mapping[str, Any] = manifest["layers"]
        self.domains = [str(item["name"]) for item in manifest["text"]["domains"]]

    @classmethod
    def open(cls, folder: Path) -> Grams:
        """Open a folder.

        Raises:
            InputError: no such folder, or one of another kind or schema.
        """
        hint = "make one with moesurg calibrate --linear-grams"
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of statistics", hint=hint)
        manifest = read_json(contained(folder, JSON_FILE))
        if manifest.get("mode") != cls.mode or manifest.get("schema_version") != SCHEMA_VERSION:
            raise InputError(
                f"{folder}: holds no Gram matrices of linear layers of schema version {SCHEMA_VERSION}",
                hint=hint,
            )
        if not isinstance(manifest.get("layers"), dict) or not isinstance(
            manifest.get("text"), dict
        ):
            raise InputError(f"{folder / JSON_FILE}: layers or text is missing")
        with as_written(folder / JSON_FILE):
            return cls(folder, manifest)

    @property
    def layers(self) -> list[int]:
        return sorted(map(int, self._layers))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of the other files."""
        return file_digest(self.folder / JSON_FILE)

    def read(self, layer: int, module: str) -> tuple[torch.Tensor, int]:
        """The matrix of a linear layer's inputs (float32) and the number of inputs it sums.

        Args:
            module: the name below the layer's prefix, see :class:`Linear`.

        Raises:
            InputError: there is none, or it is damaged.
        """
        entry = self._layers.get(str(layer), {})
        name = entry.get("source", {}).get(module)
        if name is None:
            raise InputError(f"{self.folder}: has no Gram matrix of layer {layer}, {module}")
        file = contained(self.folder, layer_file(layer))
        tensors = read_header(file)
        if name not in tensors:
            raise InputError(f"{file}: tensor {name!r} is missing")
        with TensorReader(Checkpoint(self.folder, {}, tensors, (file,))) as reader:
            return reader.read(Region(name, tensors[name].shape)), int(entry["rows"][name])

    def check_files(self) -> None:
        """Raise InputError where a file is missing or differs from its digest."""
        for layer, entry in self._layers.items():
            file = contained(self.folder, layer_file(int(layer)))
            if file_digest(file) != entry["sha256"]:
                raise InputError(f"{file}: its SHA-256 differs from that in {JSON_FILE}")

    def check_model(self, model: Model, digest: str | None = None) -> None:
        """Refuse matrices of another model.

        Args:
            digest: the model's :func:`model_digest` where the caller has it.

        Raises:
            InputError: naming what differs.
        """
        found: dict[str, object] = {
            "model_type": model.family.model_type,
            "hidden": model.config.hidden,
        }
        if digest is not None:
            found["model_sha256"] = digest
        refuse_another(
            self.folder, self.manifest, found, f"calibrate --linear-grams on {model.folder}"
        )


class ShiftedGrams(Grams):
    """Two matrices an input: Y^T Y under the name of the module, X^T Y under that and ``.cross``.

    X are inputs of the original model, Y those that the model gives whose matrices before it are replaced.
    """

    mode = "shifted"


class GivenGrams(Given):
    """A folder from ``moesurg calibrate --linear-grams``."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._grams = Grams.open(folder)
        super().__init__(model, self._grams)

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Grams:
        self._grams.check_files()
        return self._grams


class FreshGrams(Fresh):
    """Matrices collected by the run itself, in its staging folder until the commit."""

    _folder_class = Grams

    def __init__(
        self, model: Model, data: Sequence[Path], tokens: int, seq_len: int, device: str
    ) -> None:
        super().__init__(model, data, tokens, seq_len, device)
        self.files = (JSON_FILE, *(layer_file(layer.index) for layer in model.layers))
        self.identity["mode"] = self._folder_class.mode

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Grams:
        from .grams import manifest_file

        _check_room(self.model, staging.path)
        sequences = self._sequences(progress)
        origin = Origin(self.model.checkpoint)
        progress.stage("calibrating", len(self.model.layers))

        def report(_: str, finished: int, total: int) -> None:
            progress.advance()
            stop.check()

        with TensorReader(self.model.checkpoint) as reader:
            manifest = self._collector()(
                self.model,
                reader,
                sequences,
                staging.write_file,
                device=self._device,
                scratch=staging.path,
                progress=report,
            )
        staging.write_file(*manifest_file({**manifest, **origin.finish()}))
        return self._folder_class.open(staging.path)

    def _collector(self) -> Callable[..., dict[str, object]]:
        """What collects and writes the layers' files, and gives their manifest."""
        from .grams import collect_grams

        return collect_grams


class FreshShifted(FreshGrams):
    """Matrices of the original and the compressed model together, which is made on the way.

    Args:
        units: of the run; those of linear layers are replaced as they will be.
        replacement: the method's, from a unit, its matrix, Y^T Y and X^T Y to the matrix in its place.
    """

    _folder_class = ShiftedGrams

    def __init__(
        self,
        model: Model,
        data: Sequence[Path],
        tokens: int,
        seq_len: int,
        device: str,
        units: Sequence[Unit],
        replacement: Callable[[Unit, Any, Any, Any], Any],
    ) -> None:
        super().__init__(model, data, tokens, seq_len, device)
        self._units, self._replacement = units, replacement

    def _collector(self) -> Callable[..., dict[str, object]]:
        from .shifted import collect_shifted

        return partial(collect_shifted, units=self._units, replacement=self._replacement)


def calibrate_grams(
    model: Model,
    output: Path,
    *,
    data: Sequence[Path],
    tokens: int,
    seq_len: int,
    device: str,
    force: bool,
    resume: bool,
    progress: Progress,
) -> Grams:
    """Run text through a model once and write the folder of its linear layers' Gram matrices.

    Raises:
        MoesurgError: any of its kinds; nothing is left behind.
    """
    fresh = FreshGrams(model, data, tokens, seq_len, device)
    keep_folder(fresh, output, force=force, resume=resume, progress=progress)
    return Grams.open(output)


def _check_room(model: Model, folder: Path) -> None:
    inputs = {(linear.layer, linear.module): linear.region.shape[1] for linear in linears(model)}
    # An upper bound: layers that share an input are counted each.
    needed = 4 * sum(width**2 for width in inputs.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RefusedError(
            f"{folder}: Gram matrices may need {needed:,} bytes, {free:,} are free",
            hint="make room, or compress fewer --targets without text",
        )


def layer_statistics(grams: Grams, model: Model) -> dict[str, object]:
    """A method's decisions that are none: how many inputs each layer's matrices sum, for the report.

    Raises:
        InputError: a layer has no matrices.
    """
    decided: dict[str, object] = {}
    for layer in model.layers:
        entry = grams.manifest["layers"].get(str(layer.index))
        if entry is None:
            raise InputError(f"{grams.folder}: has no Gram matrices of layer {layer.index}")
        decided[str(layer.index)] = {"rows": entry["rows"]}
    return decided
