"""Mean inputs of every layer's feed-forward on the text of each domain, and a sample of those inputs.

What a router sees is the input of the feed-forward, after its norm, at every real token; padding is left out. Sums are
float64. The sample is evenly spread over each domain's tokens, in float32, with the sequence that each is of. There are
three modes:

* ``means``: every token counts equally.
* ``prompts``: each line of a text (each record of a ``.jsonl`` file) is read by itself and counts equally, whatever its
  length; one longer than a sequence counts as several.
* ``neurons``: ``means``, and by domain the mean of the neurons' absolute values, which the down projection is given,
  and the text itself as token ids.

A run keeps them in its staging folder until its commit: ``statistics.json``; for each layer
``means.<index>.safetensors`` with ``mean`` [C, D] in float64 for C domains, ``neurons`` [C, F] in float64,
``sample.<domain>`` [N, D] in float32 and ``sequence.<domain>`` [N] in int64; and ``text.safetensors`` with ``ids`` [T],
``lengths`` and ``domains`` [S] of S sequences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.header import read_header, read_json
from ..checkpoint.reader import Checkpoint, TensorReader, contained, file_digest
from ..checkpoint.region import Region
from ..errors import InputError
from .corpus import Corpus, Domain
from .sources import Fresh, Origin
from .statistics import JSON_FILE, SCHEMA_VERSION

if TYPE_CHECKING:
    import torch

    from ..architectures.model import Model
    from ..checkpoint.commit import Staging
    from ..progress import Progress, Stop
    from .sequences import Sequences

MODES = ("means", "prompts", "neurons")
TEXT_FILE = "text.safetensors"
SAMPLE = 512
"""Tokens of each domain that are kept, where the method does not say how many it needs."""


def layer_file(layer: int) -> str:
    """The file with what belongs to a layer."""
    return f"means.{layer}.safetensors"


class Means:
    """A folder with mean inputs. Tensors are read when asked for."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.mode = str(manifest["mode"])
        self.domains = [str(item["name"]) for item in manifest["text"]["domains"]]

    @classmethod
    def open(cls, folder: Path) -> Means:
        """Open a run's staging folder."""
        return cls(folder, read_json(contained(folder, JSON_FILE)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of the tensors."""
        return file_digest(self.folder / JSON_FILE)

    def mean(self, layer: int) -> torch.Tensor:
        """Mean inputs by domain: float64 [C, D]."""
        return self._read(layer_file(layer), ["mean"])[0]

    def neurons(self, layer: int) -> torch.Tensor:
        """Mean absolute values of the layer's neurons by domain: float64 [C, F]. Mode ``neurons`` only."""
        return self._read(layer_file(layer), ["neurons"])[0]

    def samples(self, layer: int) -> list[torch.Tensor]:
        """Sampled inputs of every domain: float32 [N, D] each."""
        return self._of_domains(layer, "sample")

    def sampled(self, layer: int) -> int:
        """Sampled inputs of all domains together."""
        tensors = read_header(contained(self.folder, layer_file(layer)))
        return sum(info.shape[0] for name, info in tensors.items() if name.startswith("sample."))

    def sequences(self, layer: int) -> list[torch.Tensor]:
        """The number, within its domain, of the sequence that each sampled input is of: int64 [N] each."""
        return self._of_domains(layer, "sequence")

    def text(self) -> list[list[torch.Tensor]]:
        """Token ids of every sequence of every domain: int64. Mode ``neurons`` only."""
        ids_T, length_S, domain_S = self._read(TEXT_FILE, ["ids", "lengths", "domains"])
        split: Any = ids_T.split  # torch has no types for it
        pieces: list[torch.Tensor] = split(length_S.tolist())
        found: list[list[torch.Tensor]] = [[] for _ in self.domains]
        for ids, domain in zip(pieces, domain_S.tolist(), strict=True):
            found[domain].append(ids)
        return found

    def _of_domains(self, layer: int, what: str) -> list[torch.Tensor]:
        names = [f"{what}.{domain}" for domain in range(len(self.domains))]
        return self._read(layer_file(layer), names)

    def _read(self, name: str, names: Sequence[str]) -> list[torch.Tensor]:
        file = contained(self.folder, name)
        tensors = read_header(file)
        with TensorReader(Checkpoint(self.folder, {}, tensors, (file,))) as reader:
            return [reader.read(Region(name, tensors[name].shape)) for name in names]


class FreshMeans(Fresh):
    """Means collected by the run itself, in its staging folder until the commit.

    Args:
        mode: one of `MODES`.
        sample: tokens that are kept, of every domain the same number or all it has; 0 for `SAMPLE` of each.
        texts: how many texts there have to be; 0 for any number.

    Raises:
        InputError: unusable text, or another number of texts.
    """

    def __init__(
        self,
        model: Model,
        data: Sequence[Path],
        tokens: int,
        seq_len: int,
        device: str,
        *,
        mode: str = "means",
        sample: int = 0,
        texts: int = 0,
    ) -> None:
        super().__init__(model, data, tokens, seq_len, device)
        self._mode = mode
        found = len(self._corpus.domains)
        if texts and found != texts:
            raise InputError(
                f"{found} texts {'are given' if data else 'are built in'}, this router needs {texts}",
                hint="give --data once for every expert or model, in their order, and neutral text last",
            )
        if mode == "prompts":
            self._corpus = _lines(self._corpus, data)
        self._sample = -(-sample // len(self._corpus.domains)) if sample else SAMPLE
        self.identity |= {
            # A list: experts are named by the order of the files.
            "text": [[domain.name, domain.digest] for domain in self._corpus.domains],
            "mode": mode,
            "sample": self._sample,
        }
        self.files = (JSON_FILE, *(layer_file(layer.index) for layer in model.layers))
        if mode == "neurons":
            self.files = (*self.files, TEXT_FILE)

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Means:
        from safetensors.torch import save

        from .forward import LayerStream
        from .mean_sums import observe

        sequences = self._sequences(progress)
        origin = Origin(self.model.checkpoint)
        progress.stage("calibrating", len(self.model.layers))
        written: dict[str, str] = {}

        def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
            staging.write_file(name, save(tensors))
            written[name] = file_digest(staging.path / name)

        with TensorReader(self.model.checkpoint) as reader:
            stream = LayerStream(self.model, reader, device=self._device, scratch=staging.path)
            with stream.run(sequences) as run:
                for step in run.layers():
                    write(layer_file(step.index), observe(step, self._mode, self._sample))
                    progress.advance()
                    stop.check()
        if self._mode == "neurons":
            write(TEXT_FILE, _text(sequences))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "mode": self._mode,
            "model_type": self.model.family.model_type,
            "hidden": self.model.config.hidden,
            "text": sequences.manifest(),
            "sha256": written,
            "device": self._device,
            **origin.finish(),
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        staging.write_file(JSON_FILE, text.encode())
        return Means.open(staging.path)


def _lines(corpus: Corpus, files: Sequence[Path]) -> Corpus:
    """Every line of a given text as a document of its own; records and the built-in texts' documents are already."""
    found = []
    for number, domain in enumerate(corpus.domains):
        if files and files[number].suffix != ".jsonl":
            lines = [line for text in domain.documents for line in text.splitlines()]
            domain = Domain(domain.name, tuple(line for line in lines if line.strip()))
        found.append(domain)
    return Corpus(tuple(found))


def _text(sequences: Sequences) -> dict[str, torch.Tensor]:
    import torch

    return {
        "ids": torch.cat([torch.from_numpy(ids) for ids in sequences.ids]),
        "lengths": torch.tensor([len(ids) for ids in sequences.ids]),
        "domains": torch.tensor(sequences.domain_of),
    }
