"""Linear layers stored in low-rank form. Part of the model code that moesurg writes beside a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KEY = "moesurg_linears"


class FactorsLinear(nn.Module):
    """y = B (A x) + b."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.lowrank_A = nn.Linear(inputs, rank, bias=False)
        self.lowrank_B = nn.Linear(rank, outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lowrank_B(self.lowrank_A(x))
        return y if self.bias is None else y + self.bias


class PivotLinear(nn.Module):
    """Some rows of the weight as they are (``pivot_rows``), the others as combinations of these.

    ``pivot_index`` lists the places of the rows in the output, ascending.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.pivot_rows = nn.Linear(inputs, rank, bias=False)
        self.pivot_coef = nn.Linear(rank, outputs - rank, bias=False)
        self.register_buffer("pivot_index", torch.arange(rank, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._places = Places()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pivots: torch.Tensor = self.pivot_rows(x)
        both = torch.cat([pivots, self.pivot_coef(pivots)], dim=-1)
        y = both.index_select(-1, self._places(self.pivot_index, both.shape[-1]))
        return y if self.bias is None else y + self.bias

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._places.forget()
        super()._load_from_state_dict(*args, **kwargs)


class Places:
    """Where outputs lie among pivots followed by others; worked out once, as an index stays what was loaded."""

    def __init__(self) -> None:
        self._known: tuple[Any, torch.Tensor] | None = None

    def __call__(self, index: Any, size: int) -> torch.Tensor:
        """From ascending pivots [..., R] to the place of each of ``size`` outputs, [..., size]."""
        if self._known is None or self._known[0] is not index:
            self._known = (index, self._work_out(index, size))
        return self._known[1]

    def forget(self) -> None:
        """The index may have other values now."""
        self._known = None

    @staticmethod
    def _work_out(index: torch.Tensor, size: int) -> torch.Tensor:
        rank = index.shape[-1]
        chosen = torch.zeros(*index.shape[:-1], size, dtype=torch.long, device=index.device)
        chosen = chosen.scatter(-1, index.long(), 1)
        among_others = rank + (1 - chosen).cumsum(-1) - 1
        return torch.where(chosen.bool(), chosen.cumsum(-1) - 1, among_others)


FORMS = {"factors": FactorsLinear, "pivot": PivotLinear}


def apply(body: nn.Module, config: Any) -> None:
    """Put low-rank layers in the place of the listed linear layers of a base model.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_linears`` lists the layers by module name inside the base model:
            ``{"layers.0.mlp.up_proj": {"form": "pivot", "rank": 256}, ...}``.

    Raises:
        ValueError: a name is not that of a linear layer, or a form is unknown.
    """
    for name, entry in getattr(config, KEY).items():
        parent_name, _, leaf = name.rpartition(".")
        parent = body.get_submodule(parent_name)
        old = getattr(parent, leaf, None)
        if type(old) is not nn.Linear or entry.get("form") not in FORMS:
            raise ValueError(f"config.json: {name} is no linear layer or has an unknown form")
        bias = old.bias is not None
        new = FORMS[entry["form"]](old.in_features, old.out_features, int(entry["rank"]), bias)
        setattr(parent, leaf, new)
