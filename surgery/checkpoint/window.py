"""Strided parts of a tensor (gate and up of an expert, say) that wait in memory until they cover a range whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .region import Region

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Window:
    """A flat range of a tensor and the strided parts written to it so far.

    Attributes:
        begin, end: elements.
        parts: what was written, in its stored type.
    """

    tensor: str
    begin: int
    end: int
    parts: tuple[tuple[Region, torch.Tensor], ...]

    @staticmethod
    def of(region: Region, cast: torch.Tensor) -> Window:
        begin, count = region.span()
        return Window(region.tensor, begin, begin + count, ((region, cast),))

    @property
    def complete(self) -> bool:
        """Whether every element was written: the parts are disjoint, so that counting them is enough."""
        return sum(region.count for region, _ in self.parts) == self.end - self.begin

    def meets(self, other: Window) -> bool:
        """Whether the two ranges overlap."""
        return self.tensor == other.tensor and self.begin < other.end and other.begin < self.end

    def joined(self, other: Window) -> Window:
        begin, end = min(self.begin, other.begin), max(self.end, other.end)
        return Window(self.tensor, begin, end, (*self.parts, *other.parts))

    def assembled(self) -> torch.Tensor:
        """The range as one flat tensor."""
        flat = self.parts[0][1].new_empty(self.end - self.begin)
        for region, part in self.parts:
            offset = region.offset - self.begin
            flat.as_strided(region.shape, region.strides, offset).copy_(part)
        return flat
