"""Statistics of experts for a run: from a folder, or collected on the spot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..architectures.model import Layer, Model
from ..checkpoint.reader import TensorReader
from ..errors import InputError
from ..methods.base import DataNeed
from .sources import Fresh, Given, Origin
from .statistics import JSON_FILE, TENSOR_FILE, Statistics

if TYPE_CHECKING:
    from ..checkpoint.commit import Staging
    from ..progress import Progress, Stop
    from .collect import Collected
    from .layer_collector import Mode


class GivenStatistics(Given):
    """A folder that ``moesurg calibrate`` made.

    Raises:
        InputError: no such folder, one of another model, or one without what the method needs.
    """

    def __init__(self, model: Model, folder: Path, mode: DataNeed, sample: int) -> None:
        self._statistics = Statistics.open(folder)
        super().__init__(model, self._statistics)
        if mode == "all-expert" and self._statistics.mode != "all":
            raise InputError(
                f"{folder}: the method needs all-expert statistics, these are of routed experts only",
                hint="rerun calibrate without --routed-only",
            )
        if sample:
            self._check_sample(model, sample)

    def _check_sample(self, model: Model, sample: int) -> None:
        text = self._statistics.manifest["text"]
        tokens = text.get("tokens") if isinstance(text, dict) else None
        needed = min(sample, tokens) if isinstance(tokens, int) else sample
        for layer in model.moe_layers:
            rows, _ = self._statistics.inputs_shape(layer.index)
            if rows < needed:
                raise InputError(
                    f"{self._statistics.folder}: holds {rows} sampled inputs of layer {layer.index}, "
                    f"the method needs {needed}",
                    hint=f"rerun moesurg calibrate with --inputs {needed}",
                )

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Statistics:
        return self._statistics


class FreshStatistics(Fresh):
    """Statistics collected by the run itself.

    Args:
        sample: rows of each mixture's input to keep.
        kept: what else :func:`collect` keeps, for a folder that outlives the run. A text of fewer tokens than
            ``sample`` is refused then; otherwise all of its rows are kept.
    """

    files: tuple[str, ...] = (JSON_FILE, TENSOR_FILE)

    def __init__(
        self,
        model: Model,
        data: Sequence[Path],
        tokens: int,
        seq_len: int,
        mode: DataNeed,
        device: str,
        sample: int,
        kept: dict[str, bool] | None = None,
    ) -> None:
        super().__init__(model, data, tokens, seq_len, device)
        self._mode: Mode = "all" if mode == "all-expert" else "routed"
        self._sample, self._kept = sample, kept
        self._collector: Callable[..., Collected] | None = None
        self.identity |= {"mode": self._mode, "inputs": sample, **(kept or {})}

    def load(self, staging: Staging, progress: Progress, stop: Stop) -> Statistics:
        from .collect import collect

        sequences = self._sequences(progress)
        origin = Origin(self.model.checkpoint)
        done = 0

        def report(_: str, finished: int, total: int) -> None:
            nonlocal done
            if not done:
                progress.stage("calibrating", total)
            progress.advance(finished - done)
            done = finished
            stop.check()

        with TensorReader(self.model.checkpoint) as reader:
            collected = (self._collector or collect)(
                self.model,
                reader,
                sequences,
                scratch=staging.path,
                progress=report,
                mode=self._mode,
                device=self._device,
                inputs=min(self._sample, sequences.total) if self._kept is None else self._sample,
                **(self._kept or {}),
            )
        for name, content in collected.files(origin.finish()).items():
            staging.write_file(name, content)
        return Statistics.open(staging.path)

    def behind(
        self, operate: Callable[[Layer, Statistics], tuple[Model, TensorReader]], targets: bool
    ) -> FreshStatistics:
        """The same, collected behind the layers that the run operates on and makes on the way."""
        from .sequential import collect_sequential

        self._collector = partial(collect_sequential, operate=operate, targets=targets)
        self.identity["sequential"] = True
        return self
