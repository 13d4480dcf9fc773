"""Running one unit of a plan: read regions, compute, write regions at their planned offsets.

A worker opens its own inputs and the staged shards, so that nothing but small records travels between processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from .casts import relative_loss
from .checkpoint.dtypes import torch_dtype
from .checkpoint.finite import first_non_finite
from .checkpoint.reader import TensorReader
from .checkpoint.region import Region
from .checkpoint.window import Window
from .checkpoint.writer import ShardWriter
from .errors import InputError, MoesurgError
from .methods import load
from .plan import COPY_BUFFER, Plan, Unit, element_bytes
from .seeding import stream
from .sources import Source, kind_of, open_source

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .adapters.adapter import Adapter
    from .architectures.model import Model
    from .calibration.statistics import Statistics
    from .checkpoint.writer import Data

PLAN_FILE = "plan.json"


class Writer(Protocol):
    """Where results go."""

    def write(self, name: str, data: Data, *, offset: int = 0) -> None: ...

    def close(self) -> None: ...


class Runner:
    """Runs units of one plan into one staging folder."""

    def __init__(
        self, plan: Plan, folder: Path, sources: Sequence[Source], writer: Writer | None = None
    ) -> None:
        self.plan = plan
        self.sources = sources[: len(sources) - plan.references]
        self.specs = {spec.name: spec for spec in plan.tensors}
        self.readers = [TensorReader(source.checkpoint) for source in sources]
        self.writer = writer or ShardWriter(folder, plan.shards, create=False)
        kind = kind_of([source.folder for source in self.sources])
        self.method = load(plan.command, plan.method, kind)
        self._folder = folder
        self._buffer = bytearray(COPY_BUFFER)
        self._units = {unit.id: unit for unit in plan.units}
        self.stepped: Callable[[], None] = lambda: None
        """Told of every step inside a unit; may raise to stop the run."""

    @classmethod
    def open(cls, folder: Path) -> Runner:
        """A runner in a worker process, from the staged plan."""
        plan = Plan.from_json((folder / PLAN_FILE).read_text())
        return cls(plan, folder, [open_source(Path(source)) for source in plan.sources])

    @cached_property
    def statistics(self) -> Statistics:
        """The run's statistics, opened by this process when a unit first asks for their rows."""
        from .calibration.statistics import Statistics

        return Statistics.open(self.statistics_folder)

    @property
    def statistics_folder(self) -> Path:
        """Where the run's statistics lie.

        Raises:
            MoesurgError: the run has none.
        """
        if not self.plan.statistics:
            raise MoesurgError(f"method {self.plan.method} asked for statistics it did not plan")
        return self._folder / self.plan.statistics

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.writer.close()

    def run(self, unit_id: str, decision: Any) -> dict[str, object]:
        """Run a unit and return its metrics.

        Raises:
            InputError: a source is damaged; the message names file and tensor.
        """
        unit = self._units[unit_id]
        for move in unit.moves:
            self.copy(move.read, move.writes)
        if unit.kind == "copy":
            return {}
        import torch

        work = Work(self, unit, decision)
        threads = torch.get_num_threads()
        # Sums and factorisations round differently with another number of threads: one, always.
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                metrics = self.method.transform(work)
        finally:
            torch.set_num_threads(threads)
        work.finish()
        if work.casts:
            metrics = {**metrics, "cast_error": max(work.casts.values())}
        return metrics

    def copy(self, read: Region, writes: Sequence[Region]) -> None:
        """Move the bytes of a contiguous region to contiguous regions of the same size."""
        info = self.readers[read.source].info(read.tensor)
        size = element_bytes(info.dtype)
        first, count = read.span()
        if not read.contiguous or not all(region.contiguous for region in writes):
            raise MoesurgError(f"copies are of contiguous regions, {read.tensor!r} is not")
        position, total = first * size, count * size
        done = 0
        while done < total:
            length = min(COPY_BUFFER, total - done)
            view = memoryview(self._buffer)[:length]
            self.readers[read.source].read_into(info, position + done, view)
            for region in writes:
                self.writer.write(region.tensor, view, offset=region.offset * size + done)
            done += length


class Work:
    """What a transform is given: lazy reads, planned writes, its parameters and its own randomness."""

    def __init__(self, runner: Runner, unit: Unit, decision: Any) -> None:
        self._runner = runner
        self._written: set[Region] = set()
        self._windows: list[Window] = []
        self.unit = unit
        self.decision = decision
        self.casts: dict[str, float] = {}

    @property
    def params(self) -> Any:
        return self.unit.params

    def step(self) -> None:
        """Tell that one of the unit's planned steps is done."""
        self._runner.stepped()

    @property
    def sources(self) -> Sequence[Source]:
        return self._runner.sources

    @property
    def models(self) -> Sequence[Model]:
        """The sources of a run that starts from models."""
        return cast("Sequence[Model]", self._runner.sources)

    @property
    def adapters(self) -> Sequence[Adapter]:
        """The sources of a run that starts from adapters."""
        return cast("Sequence[Adapter]", self._runner.sources)

    @property
    def model(self) -> Model:
        """The first (often only) source."""
        return self.models[0]

    @property
    def statistics(self) -> Path:
        """The folder of the run's statistics, for methods whose units read them."""
        return self._runner.statistics_folder

    @cached_property
    def layer(self) -> int:
        if self.unit.layer is None:
            raise MoesurgError(f"unit {self.unit.id} belongs to no layer")
        return self.unit.layer

    def rng(self, *path: str | int) -> np.random.Generator:
        """The random stream of a purpose; the same wherever and whenever the unit runs."""
        return stream(self._runner.plan.seed, self._runner.plan.method, *path)

    def read(self, region: Region) -> torch.Tensor:
        """A region as float32, or float64 where it is stored so."""
        import torch

        stored = self._runner.readers[region.source].read(region)
        return stored if stored.dtype == torch.float64 else stored.float()

    def inputs(self) -> torch.Tensor:
        """Sampled inputs of the layer's mixture [N, D], float32: the rows the plan asked for by ``sample``.

        Raises:
            InputError: the statistics hold none.
        """
        import torch

        rows_ND, _ = self._runner.statistics.inputs(self.layer)
        return torch.from_numpy(rows_ND.copy())

    def energies(self) -> torch.Tensor:
        """Squared norms of the original hidden states after the layer, of the tokens of :meth:`inputs`: [N] float64.

        Raises:
            InputError: the statistics hold none.
        """
        import torch

        return torch.from_numpy(self._runner.statistics.energies(self.layer).copy())

    def targets(self) -> torch.Tensor | None:
        """What the original model's mixture gives the tokens of :meth:`inputs`, [N, D] float64.

        None where the inputs are those of the original model, so that its mixture's output on them is the target.
        """
        import torch

        found = self._runner.statistics.targets(self.layer)
        return None if found is None else torch.from_numpy(found.copy()).double()

    def dtype(self, region: Region) -> str:
        """The type that is planned for the region."""
        return self._runner.specs[region.tensor].dtype

    def stored(self, region: Region, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in the type that is planned for the region."""
        return tensor.to(torch_dtype(self._runner.specs[region.tensor].dtype))

    def write(self, region: Region, tensor: torch.Tensor) -> torch.Tensor:
        """Cast once to the planned type and write.

        Returns:
            What was written: the tensor in the planned type.

        Raises:
            MoesurgError: not a region of this unit, or another shape.
            InputError: the result is not finite in the planned type.
        """
        import torch

        if region not in self.unit.writes or tuple(tensor.shape) != region.shape:
            raise MoesurgError(
                f"unit {self.unit.id}: writes {tuple(tensor.shape)} to {region}, which is not planned"
            )
        cast = self.stored(region, tensor)
        flat = cast.contiguous().reshape(-1).view(torch.uint8).numpy().data
        if first_non_finite(flat, self._runner.specs[region.tensor].dtype) is not None:
            raise InputError(
                f"unit {self.unit.id}: the result for {region.tensor!r} is not finite in "
                f"{self._runner.specs[region.tensor].dtype}",
                hint="the input holds values too large for its type to be averaged",
            )
        # A cast to its own type is the tensor itself, which the difference in place would zero.
        changes = tensor.is_floating_point() and cast.dtype != tensor.dtype
        error = relative_loss(tensor, cast) if changes else None
        if error is not None:
            self.casts[region.tensor] = max(self.casts.get(region.tensor, 0.0), error)
        self._put(region, cast)
        self._written.add(region)
        return cast

    def copy(self, read: Region, write: Region) -> None:
        """Move a contiguous region's bytes unchanged, for what is kept only after a decision.

        Raises:
            MoesurgError: not a region of this unit, or another type or size.
        """
        stored = self._runner.readers[read.source].info(read.tensor)
        if (
            write not in self.unit.writes
            or self._runner.specs[write.tensor].dtype != stored.dtype
            or read.count != write.count
        ):
            raise MoesurgError(
                f"unit {self.unit.id}: copies {read} to {write}, which is not planned"
            )
        self._runner.copy(read, [write])
        self._written.add(write)

    def finish(self) -> None:
        """Check that all planned regions were written."""
        missing = [region for region in self.unit.writes if region not in self._written]
        if missing:
            raise MoesurgError(f"unit {self.unit.id} did not write {missing[0]}")
        if self._windows:
            raise MoesurgError(
                f"unit {self.unit.id} left gaps in {self._windows[0].tensor!r}, which other units would "
                "have to fill"
            )

    def _put(self, region: Region, cast: torch.Tensor) -> None:
        import torch

        size = cast.element_size()
        if region.contiguous:
            data = cast.contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._runner.writer.write(region.tensor, data, offset=region.offset * size)
            return
        # Strided parts of one window (gate and up of an expert, say) wait for each other in memory.
        window = Window.of(region, cast)
        apart = []
        for other in self._windows:
            if window.meets(other):
                window = window.joined(other)
            else:
                apart.append(other)
        self._windows = apart
        if window.complete:
            data = window.assembled().view(torch.uint8).numpy().data
            self._runner.writer.write(window.tensor, data, offset=window.begin * size)
        else:
            self._windows.append(window)
