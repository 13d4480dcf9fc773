"""The weights of a run's sources while a method decides: read on demand, nothing kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .checkpoint.reader import TensorReader
from .checkpoint.region import Region

if TYPE_CHECKING:
    import torch

    from .progress import Progress, Stop
    from .sources import Source

Item = TypeVar("Item")
BLOCK = 4 << 20
"""Elements of a region that :meth:`Weights.blocks` holds at a time."""


class Weights:
    """Gives a method's ``decide_from_weights`` what it asks for, on one torch thread.

    Args:
        sources: of the run; a region says which one it lies in.
        progress, stop: told of, and asked between, the steps of :meth:`track`.
    """

    def __init__(self, sources: Sequence[Source], progress: Progress, stop: Stop) -> None:
        self.sources: Sequence[Any] = sources
        self._readers = [TensorReader(source.checkpoint) for source in sources]
        self._progress, self._stop = progress, stop

    def __enter__(self) -> Weights:
        import torch

        # Sums round differently with another number of threads: one, always.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._inference: Any = torch.inference_mode()
        self._inference.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        import torch

        self._inference.__exit__(*details)
        torch.set_num_threads(self._threads)
        for reader in self._readers:
            reader.close()

    def track(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items one by one, as steps that are shown and after which the run can be stopped."""
        self._progress.stage("deciding", len(items))
        for item in items:
            self._stop.check()
            yield item
            self._progress.advance()

    def read(self, region: Region) -> torch.Tensor:
        """A region as float32, or float64 where it is stored so."""
        import torch

        stored = self._readers[region.source].read(region)
        return stored if stored.dtype == torch.float64 else stored.float()

    def blocks(self, region: Region) -> Iterator[torch.Tensor]:
        """A matrix in blocks of whole rows, as :meth:`read` gives them."""
        rows = max(1, BLOCK * region.shape[0] // max(1, region.count))
        for start in range(0, region.shape[0], rows):
            yield self.read(region.rows(start, min(start + rows, region.shape[0])))
