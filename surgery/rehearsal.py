"""What a run's units of one layer will write, kept in memory: for runs that have to know it before they write.

Calibration that goes from layer to layer runs text through layers that were already operated on, and numbers of experts
by layer are chosen by what a layer gives with each of them. Both run the very units that write the output, with the
same bytes as the result, into memory instead of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .architectures.model import Model
from .checkpoint.header import TensorInfo
from .checkpoint.layout import TensorSpec
from .checkpoint.reader import Checkpoint, TensorReader
from .checkpoint.writer import as_bytes
from .errors import InputError, MoesurgError
from .execute import Runner

if TYPE_CHECKING:
    from .calibration.statistics import Statistics
    from .checkpoint.writer import Data
    from .methods.base import Draft
    from .plan import Plan
    from .sources import Source


class HeldTensors:
    """Stands for the writer of a run's files: keeps what is written, whole tensors at a time."""

    def __init__(self, specs: Iterable[TensorSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.tensors: dict[str, bytearray] = {}

    def write(self, name: str, data: Data, *, offset: int = 0) -> None:
        """Keep bytes of a tensor, beginning ``offset`` bytes into it."""
        view = as_bytes(data)
        if name not in self.tensors:
            self.tensors[name] = bytearray(self._specs[name].nbytes)
        self.tensors[name][offset : offset + len(view)] = view

    def close(self) -> None:
        """Nothing is open."""


class RehearsedReader(TensorReader):
    """Reads a layer's operated tensors from memory, and everything else from the source it is copied from."""

    def __init__(
        self, held: HeldTensors, planned: Mapping[str, TensorInfo], source: TensorReader
    ) -> None:
        super().__init__(source.checkpoint)
        self._held, self._planned, self._source = held.tensors, planned, source

    def info(self, name: str) -> TensorInfo:
        return self._planned[name] if name in self._held else self._source.info(name)

    def read_into(self, info: TensorInfo, offset: int, out: memoryview) -> None:
        if info.name in self._held:
            out[:] = memoryview(self._held[info.name])[offset : offset + len(out)]
        else:
            self._source.read_into(info, offset, out)


class Rehearsal:
    """One plan, whose layers can be tried.

    Args:
        plan: of an output with one number of experts in all layers, that a stock class loads.
        sources: the run's.
        draft: the plan's.

    Raises:
        InputError: the output is of no stock class, so that nothing here can run it.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source], draft: Draft) -> None:
        folder = sources[0].folder
        if draft.tier != "stock":
            raise InputError(
                f"{folder}: the result would need model code of its own with --experts "
                f"{plan.options.get('experts')}, and layers that are tried on the way have to be of the stock class",
                hint="leave out --sequential and --budget",
            )
        self._held = HeldTensors(plan.tensors)
        self._runner = Runner(plan, folder, sources, writer=self._held)
        self._source = TensorReader(sources[0].checkpoint)
        self._planned = {
            spec.name: TensorInfo(spec.name, spec.dtype, spec.shape, folder, 0, spec.nbytes)
            for spec in plan.tensors
        }
        self.model = Model(Checkpoint(folder, draft.config, self._planned, ()))
        """The output, seen through its family."""

    def layer(self, index: int, decision: Any, statistics: Statistics) -> TensorReader:
        """Run a layer's units, and give a reader of the output in which that layer is operated on.

        What an earlier call kept is forgotten.

        Args:
            decision: the layer's.
            statistics: what ``work.inputs`` and ``work.targets`` read.
        """
        self._held.tensors.clear()
        self._runner.statistics = statistics
        ran = 0
        for unit in self._runner.plan.units:
            if unit.kind == "transform" and unit.layer == index:
                self._runner.run(unit.id, decision)
                ran += 1
        if not ran:
            raise MoesurgError(f"nothing is planned for layer {index}")
        return RehearsedReader(self._held, self._planned, self._source)

    def close(self) -> None:
        """Close the sources' files."""
        self._runner.close()
        self._source.close()
