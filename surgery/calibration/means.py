"""Mean inputs of every layer's feed-forward on the text of each domain, and a sample of those inputs.

What a router sees is the input of the feed-forward, after its norm, at every real token; padding is left out. Sums
are float64. The sample is evenly spread over each domain's tokens, in float32: for predictions of what a router will
select, and for methods that compute what the feed-forward's neurons do.

A run keeps them in its staging folder until its commit: ``statistics.json``, and for every layer a file
``means.<index>.safetensors`` with ``mean`` [C, D] in float64 for C domains and ``sample.<domain>`` [N, D] each, so
that no more than one layer's are in memory.
"""

from __future__ import annotations

import hashlib
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

SAMPLE = 512
"""Tokens of each domain that are kept where the method does not say how many."""


def layer_file(layer: int) -> str:
    """The file of one layer's means and sample."""
    return f"means.{layer}.safetensors"


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
        """SHA-256 of the manifest, which holds those of the layers' files."""
        return file_digest(self.folder / JSON_FILE)

    def mean(self, layer: int) -> torch.Tensor:
        """Mean inputs by domain: float64 [C, D]."""
        return self._read(layer, ["mean"])[0]

    def samples(self, layer: int) -> list[torch.Tensor]:
        """Sampled inputs of every domain: float32 [N, D] each."""
        return self._read(layer, [f"sample.{domain}" for domain in range(len(self.domains))])

    def sampled(self, layer: int) -> int:
        """Sampled inputs of all domains together."""
        tensors = read_header(contained(self.folder, layer_file(layer)))
        return sum(info.shape[0] for name, info in tensors.items() if name != "mean")

    def _read(self, layer: int, names: Sequence[str]) -> list[torch.Tensor]:
        file = contained(self.folder, layer_file(layer))
        tensors = read_header(file)
        with TensorReader(Checkpoint(self.folder, {}, tensors, (file,))) as reader:
            return [reader.read(Region(name, tensors[name].shape)) for name in names]


class FreshMeans:
    """Means collected by the run itself, in its staging folder until the commit.

    Args:
        sample: tokens that are kept, of every domain the same number or all it has; 0 for `SAMPLE` of each.
    """

    def __init__(
        self,
        model: Model,
        data: Sequence[Path],
        tokens: int,
        seq_len: int,
        device: str,
        sample: int = 0,
    ) -> None:
        self._model, self._data, self._device = model, data, device
        self._tokens, self._seq_len = tokens, seq_len
        self._corpus = read_corpus(data)
        self._sample = -(-sample // len(self._corpus.domains)) if sample else SAMPLE
        self.files: tuple[str, ...] = (
            JSON_FILE,
            *(layer_file(layer.index) for layer in model.layers),
        )
        self.identity: dict[str, Any] = {
            # A list: experts are named by the order of the files.
            "text": [[domain.name, domain.digest] for domain in self._corpus.domains],
            "tokens": tokens,
            "seq_len": seq_len,
            "mode": "means",
            "sample": self._sample,
            "device": device,
        }
        self.place = "."

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Means:
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
        layers: dict[str, str] = {}
        with TensorReader(self._model.checkpoint) as reader:
            stream = LayerStream(self._model, reader, device=self._device, scratch=staging.path)
            with stream.run(sequences) as run:
                for step in run.layers():
                    data = _observe(step, len(sequences.domains), self._sample)
                    staging.write_file(layer_file(step.index), data)
                    layers[str(step.index)] = hashlib.sha256(data).hexdigest()
                    progress.advance()
                    stop.check()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "mode": "means",
            "model_type": self._model.family.model_type,
            "hidden": self._model.config.hidden,
            "text": sequences.manifest(),
            "layers": layers,
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

    def __init__(self, step: Step, domains: int, sample: int) -> None:
        import torch

        hidden, device = step.run.stream.model.config.hidden, step.run.stream.device
        self.step, self.layer = step, step.layer
        self.total_CD = torch.zeros(domains, hidden, dtype=torch.float64, device=device)
        self.rows = [0] * domains
        self.tokens = [0] * domains
        for batch in step.run.batches:
            self.tokens[batch.domain] += batch.stop - batch.start
        self.sample = sample
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
        keep_N = _kept(self.rows[domain], len(rows_ND), self.tokens[domain], self.sample)
        self.kept[domain].append(rows_ND[keep_N.to(rows_ND.device)].float().cpu())
        self.rows[domain] += len(rows_ND)


def _kept(first: int, count: int, tokens: int, sample: int) -> torch.Tensor:
    """Which of a domain's tokens ``first`` to ``first + count`` are of the sample: bool [count].

    Exactly min(``sample``, ``tokens``) of all are, evenly spread.
    """
    import torch

    place_N = torch.arange(first, first + count)
    size = min(sample, tokens)
    return (place_N + 1) * size // tokens > place_N * size // tokens


def _observe(step: Step, domains: int, sample: int) -> bytes:
    """A layer's file."""
    import torch
    from safetensors.torch import save

    sums = _Sums(step, domains, sample)
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
    found = {
        "mean": (sums.total_CD.cpu() / rows_C1).contiguous(),
        **{
            f"sample.{domain}": torch.cat(kept).contiguous()
            for domain, kept in enumerate(sums.kept)
        },
    }
    return save(found)


def _input_module(layer: Layer) -> str:
    """The dense feed-forward's gate projection, whose input is the feed-forward's."""
    return layer.ffn["gate"].tensor.removeprefix(layer.prefix).removesuffix(".weight")
