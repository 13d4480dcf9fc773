"""Mean inputs of every layer's feed-forward on the text of each domain, and a sample of those inputs.

What a router sees is the input of the feed-forward, after its norm, at every real token; padding is left out. Sums are
float64. The sample is every n-th token of each domain in float32, for predictions of what a router will select.

A run keeps them in two files of its staging folder until its commit: ``statistics.json`` and ``means.safetensors`` with
``layer.<index>.mean`` [C, D] in float64 for C domains, and ``layer.<index>.sample.<domain>`` [N, D].
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkpoint.header import read_header, read_json
from ..checkpoint.reader import Checkpoint, TensorReader, contained, file_digest
from ..checkpoint.region import Region
from ..digests import Digests
from ..errors import InputError
from .corpus import read_corpus
from .statistics import JSON_FILE, SCHEMA_VERSION, model_digest

if TYPE_CHECKING:
    import torch

    from ..architectures.model import Layer, Model
    from ..checkpoint.commit import Staging
    from ..progress import Progress, Stop
    from .forward import Step
    from .sequences import Batch

MEANS_FILE = "means.safetensors"
SAMPLE = 512
"""Tokens of each domain that are kept."""


class Means:
    """A folder with mean inputs. Tensors are read when asked for."""

    mode = "means"

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.domains = [str(item["name"]) for item in manifest["text"]["domains"]]

    @classmethod
    def open(cls, folder: Path) -> Means:
        """Open a run's staging folder."""
        return cls(folder, read_json(contained(folder, JSON_FILE)))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds that of the tensors."""
        return file_digest(self.folder / JSON_FILE)

    def mean(self, layer: int) -> torch.Tensor:
        """Mean inputs by domain: float64 [C, D]."""
        return self._read([f"layer.{layer}.mean"])[0]

    def samples(self, layer: int) -> list[torch.Tensor]:
        """Sampled inputs of every domain: float32 [N, D] each."""
        return self._read([f"layer.{layer}.sample.{domain}" for domain in range(len(self.domains))])

    def _read(self, names: Sequence[str]) -> list[torch.Tensor]:
        file = contained(self.folder, MEANS_FILE)
        tensors = read_header(file)
        with TensorReader(Checkpoint(self.folder, {}, tensors, (file,))) as reader:
            return [reader.read(Region(name, tensors[name].shape)) for name in names]


class FreshMeans:
    """Means collected by the run itself, in its staging folder until the commit."""

    files: tuple[str, ...] = (JSON_FILE, MEANS_FILE)

    def __init__(
        self, model: Model, data: Sequence[Path], tokens: int, seq_len: int, device: str
    ) -> None:
        self._model, self._data, self._device = model, data, device
        self._tokens, self._seq_len = tokens, seq_len
        self._corpus = read_corpus(data)
        self.identity: dict[str, Any] = {
            # A list: experts are named by the order of the files.
            "text": [[domain.name, domain.digest] for domain in self._corpus.domains],
            "tokens": tokens,
            "seq_len": seq_len,
            "mode": "means",
            "device": device,
        }
        self.place = "."

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Means:
        from safetensors.torch import save

        from .forward import LayerStream
        from .sequences import tokenise

        sequences = tokenise(
            self._corpus, self._model.folder, tokens=self._tokens, seq_len=self._seq_len
        )
        if sequences.total < sequences.tokens:
            progress.warn(
                f"the text gives {sequences.total:,} of the {sequences.tokens:,} tokens asked for"
            )
        digests = Digests(self._model.checkpoint.inputs)
        progress.stage("calibrating", len(self._model.layers))
        found: dict[str, torch.Tensor] = {}
        with TensorReader(self._model.checkpoint) as reader:
            stream = LayerStream(self._model, reader, device=self._device, scratch=staging.path)
            with stream.run(sequences) as run:
                for step in run.layers():
                    found.update(_observe(step, len(sequences.domains)))
                    progress.advance()
                    stop.check()
        data = save(found)
        staging.write_file(MEANS_FILE, data)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "mode": "means",
            "model_type": self._model.family.model_type,
            "hidden": self._model.config.hidden,
            "text": sequences.manifest(),
            "sha256": file_digest(staging.path / MEANS_FILE),
            "device": self._device,
            "model_sha256": model_digest(self._model.checkpoint, digests.finish()),
            "moesurg": __version__,
        }
        text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        staging.write_file(JSON_FILE, text.encode())
        return Means.open(staging.path)

    def check(self, model: Model, digests: Mapping[Path, str]) -> None:
        """They were collected from the weights being read."""

    def arguments(self) -> list[str]:
        words = [word for file in self._data for word in ("--data", str(file))]
        return [*words, "--tokens", str(self._tokens), "--seq-len", str(self._seq_len)]


class _Sums:
    """What one layer's feed-forward is given, by domain."""

    def __init__(self, step: Step, domains: int) -> None:
        import torch

        hidden, device = step.run.stream.model.config.hidden, step.run.stream.device
        self.step, self.layer = step, step.layer
        self.total_CD = torch.zeros(domains, hidden, dtype=torch.float64, device=device)
        self.rows = [0] * domains
        tokens = [0] * domains
        for batch in step.run.batches:
            tokens[batch.domain] += batch.stop - batch.start
        self.every = [max(1, count // SAMPLE) for count in tokens]
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(domains)]
        self.batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def see(self, module: Any, args: tuple[Any, ...]) -> None:
        batch = self.batch
        if batch is None:
            return
        mask_T = self.step.run.mask(batch).flatten()
        rows_ND = args[0].reshape(-1, args[0].shape[-1])[mask_T]
        domain = batch.domain
        self.total_CD[domain] += rows_ND.double().sum(dim=0)
        first = -self.rows[domain] % self.every[domain]
        self.kept[domain].append(rows_ND[first :: self.every[domain]].float().cpu())
        self.rows[domain] += len(rows_ND)


def _observe(step: Step, domains: int) -> dict[str, torch.Tensor]:
    import torch

    sums = _Sums(step, domains)
    handle = step.module.get_submodule(_input_module(step.layer)).register_forward_pre_hook(
        sums.see
    )
    step.advance(sums.begin)
    handle.remove()
    empty = [number for number, rows in enumerate(sums.rows) if not rows]
    if empty:
        raise InputError(
            f"domain {empty[0] + 1} of the text gives no token", hint="ask for more --tokens"
        )
    rows_C1 = torch.tensor(sums.rows, dtype=torch.float64)[:, None]
    place = f"layer.{step.index}"
    return {
        f"{place}.mean": (sums.total_CD.cpu() / rows_C1).contiguous(),
        **{
            f"{place}.sample.{domain}": torch.cat(kept).contiguous()
            for domain, kept in enumerate(sums.kept)
        },
    }


def _input_module(layer: Layer) -> str:
    """The dense feed-forward's gate projection, whose input is the feed-forward's."""
    return layer.ffn["gate"].tensor.removeprefix(layer.prefix).removesuffix(".weight")
