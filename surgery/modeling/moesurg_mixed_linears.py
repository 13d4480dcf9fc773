"""Linear layers stored as parts of several kinds. Part of the model code that moesurg writes beside a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from .moesurg_linears import FORMS as LOWRANK

KEY = "moesurg_mixed_linears"


def _others(index: torch.Tensor, size: int) -> torch.Tensor:
    """Ascending, what an index of some of ``size`` places leaves out."""
    free = torch.ones(size, dtype=torch.bool, device=index.device)
    free[index.long()] = False
    return free.nonzero()[:, 0]


class ColumnsLinear(nn.Module):
    """Some columns of the weight as they are, the others a matrix of low rank."""

    def __init__(
        self, inputs: int, outputs: int, *, exact: int, rank: int, lowrank: str, **_: Any
    ) -> None:
        super().__init__()
        self.inner = LOWRANK[lowrank](inputs - exact, outputs, rank, False)
        self.columns = nn.Linear(exact, outputs, bias=False)
        self.register_buffer("column_index", torch.arange(exact, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index: Any = self.column_index
        rest = x.index_select(-1, _others(index, x.shape[-1]))
        y: torch.Tensor = self.inner(rest) + self.columns(x.index_select(-1, index))
        return y


class RowsLinear(nn.Module):
    """Some rows of the weight as they are, the others a matrix of low rank."""

    def __init__(
        self, inputs: int, outputs: int, *, exact: int, rank: int, lowrank: str, **_: Any
    ) -> None:
        super().__init__()
        self.inner = LOWRANK[lowrank](inputs, outputs - exact, rank, False)
        self.rows = nn.Linear(inputs, exact, bias=False)
        self.register_buffer("row_index", torch.arange(exact, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index: Any = self.row_index
        both = torch.cat([self.rows(x), self.inner(x)], dim=-1)
        order = torch.cat([index.long(), _others(index, both.shape[-1])])
        return both.index_select(-1, order.argsort())


_COSINES: dict[Any, torch.Tensor] = {}


def cosines(size: int, like: torch.Tensor) -> torch.Tensor:
    """The orthonormal cosine transform (DCT-II) of a size, a basis vector a row, kept for all layers that use it."""
    key = (size, like.device, like.dtype)
    if key not in _COSINES:
        place = torch.arange(size, dtype=torch.float64, device=like.device)
        basis = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
        basis[0] /= math.sqrt(2)
        _COSINES[key] = basis.to(like.dtype)
    return _COSINES[key]


class CosineLinear(nn.Module):
    """The weight by its coefficients on some vectors of the cosine transform of its inputs or its outputs."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, side: str, **_: Any) -> None:
        super().__init__()
        self.side = side
        self.size = inputs if side == "input" else outputs
        shape = (rank, outputs) if side == "input" else (inputs, rank)
        self.coefficients = nn.Linear(*shape, bias=False)
        self.register_buffer("frequencies", torch.arange(rank, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index: Any = self.frequencies
        basis = cosines(self.size, x).index_select(0, index)
        if self.side == "input":
            y: torch.Tensor = self.coefficients(x @ basis.T)
        else:
            y = self.coefficients(x) @ basis
        return y


class QuantisedLinear(nn.Module):
    """Integers with a scale for every group of inputs, and what a matrix of low rank adds.

    ``codes`` holds unsigned integers of ``bits`` bits, the first one of a byte in its lowest bits; less the middle,
    2^(bits - 1) (1 for 2 bits), they are multiples of the scale.
    """

    def __init__(
        self, inputs: int, outputs: int, *, bits: int, group: int, rank: int, **_: Any
    ) -> None:
        super().__init__()
        self.bits, self.group, self.inputs = bits, group, inputs
        width = -(-inputs // (8 // bits))
        self.register_buffer("codes", torch.zeros(outputs, width, dtype=torch.uint8))
        self.scales = nn.Parameter(torch.empty(outputs, -(-inputs // group)))
        if rank:
            self.lowrank_A = nn.Linear(inputs, rank, bias=False)
            self.lowrank_B = nn.Linear(rank, outputs, bias=False)

    def weight(self) -> torch.Tensor:
        """The integers times their scales."""
        codes: Any = self.codes
        shifts = torch.arange(0, 8, self.bits, device=codes.device, dtype=torch.uint8)
        flat = (codes[:, :, None] >> shifts) & (2**self.bits - 1)
        flat = flat.flatten(1)[:, : self.inputs]
        middle = 1 if self.bits == 2 else 2 ** (self.bits - 1)
        scales = self.scales.repeat_interleave(self.group, dim=1)[:, : self.inputs]
        weight: torch.Tensor = (flat.to(scales.dtype) - middle) * scales
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight().to(x.dtype))
        if "lowrank_A" in self._modules:
            y = y + self.lowrank_B(self.lowrank_A(x))
        return y


FORMS: dict[str, type[nn.Module]] = {
    "columns": ColumnsLinear,
    "rows": RowsLinear,
    "cosine": CosineLinear,
    "quantised": QuantisedLinear,
}


class Biased(nn.Module):
    """A layer without bias, and a bias."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x) + self.bias
        return y


def apply(body: nn.Module, config: Any) -> None:
    """Put layers of parts in the place of the listed linear layers of a base model.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_mixed_linears`` lists the layers by module name inside the base model with a ``form`` of
            FORMS and its sizes.

    Raises:
        ValueError: a name is not that of a linear layer, or a form is unknown.
    """
    for name, entry in getattr(config, KEY).items():
        parent_name, _, leaf = name.rpartition(".")
        parent = body.get_submodule(parent_name)
        old = getattr(parent, leaf, None)
        if type(old) is not nn.Linear or entry.get("form") not in FORMS:
            raise ValueError(f"config.json: {name} is no linear layer or has an unknown form")
        kind: Any = FORMS[entry["form"]]
        new = kind(old.in_features, old.out_features, **entry)
        if old.bias is not None:
            # The bias keeps its name on disk, so that the parts' names go one level down.
            new = Biased(new, old.out_features)
        setattr(parent, leaf, new)
