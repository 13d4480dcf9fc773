"""A matrix as a strided window on a stored tensor.

Families store the same experts one tensor each, stacked, fused, transposed or interleaved. A region says where
a logical matrix lies by element offset and strides, so that methods see one shape whatever the file holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache


@lru_cache(1024)
def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Region:
    """A window on a tensor.

    Attributes:
        tensor: name of the stored tensor.
        shape: the logical shape; for a projection always ``[out, in]``.
        offset: index of the first element in the flat tensor.
        strides: elements to step per dimension; left empty for a contiguous window.
        source: which input checkpoint of the operation, in the order they were given.
    """

    tensor: str
    shape: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] = field(default=())
    source: int = 0

    def __post_init__(self) -> None:
        if not self.strides:
            object.__setattr__(self, "strides", row_major(self.shape))

    @property
    def count(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def contiguous(self) -> bool:
        return self.strides == row_major(self.shape)

    def span(self) -> tuple[int, int]:
        """First element and length of the smallest flat range that holds the window."""
        if not self.count:
            return self.offset, 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return self.offset, last + 1

    def rows(self, start: int, stop: int) -> Region:
        """The rows ``start`` to ``stop`` (exclusive) along the first dimension."""
        return Region(
            self.tensor,
            (stop - start, *self.shape[1:]),
            self.offset + start * self.strides[0],
            self.strides,
            self.source,
        )

    def to_json(self) -> list[object]:
        """A compact form: strides are left out where they are row-major."""
        strides = [] if self.contiguous else list(self.strides)
        return [self.tensor, list(self.shape), self.offset, strides, self.source]

    @staticmethod
    def from_json(data: list[object]) -> Region:
        tensor, shape, offset, strides, source = data
        return Region(str(tensor), tuple(shape), offset, tuple(strides), source)  # type: ignore[arg-type]
