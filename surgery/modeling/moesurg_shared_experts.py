"""Experts whose matrices are stored as parts, each its own or shared. Part of the model code of moesurg.

Gate, up and down have a form each, by layer: one of a single matrix, as linear layers have it, with its tensors
stacked over experts, or one of those below, in which experts share something.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import linear, silu

from .moesurg_linears import FORMS as LOWRANK
from .moesurg_linears import Places
from .moesurg_mixed_linears import FORMS as MIXED

KEY = "moesurg_shared_experts"


class Whole(nn.Module):
    """A matrix for each expert."""

    def __init__(self, experts: int, outputs: int, inputs: int, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return linear(x, self.weight[expert])


class Each(nn.Module):
    """A matrix for each expert in a form that linear layers have, its tensors stacked along the first axis."""

    def __init__(
        self, experts: int, outputs: int, inputs: int, *, form: str, rank: int, **sizes: Any
    ) -> None:
        super().__init__()
        self.form = form
        layer: nn.Module
        if form in LOWRANK:
            layer = LOWRANK[form](inputs, outputs, rank, False)
        else:
            kind: Any = MIXED[form]
            layer = kind(inputs, outputs, rank=rank, **sizes)
        for name, weight in layer.named_parameters():
            owner, leaf = _owner(self, name)
            owner.register_parameter(leaf, nn.Parameter(weight.new_empty(experts, *weight.shape)))
        for name, tensor in layer.named_buffers():
            owner, leaf = _owner(self, name)
            owner.register_buffer(leaf, tensor.expand(experts, *tensor.shape).clone())
        # In a list, and without numbers: only its forward is used.
        self._layer = [layer.to("meta")]
        self._places = Places()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._places.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        # What is called most: the same as below, without its overhead.
        parts: Any = self._modules
        if self.form == "factors":
            inner = linear(x, parts["lowrank_A"].weight[expert])
            return linear(inner, parts["lowrank_B"].weight[expert])
        if self.form == "pivot":
            pivots = linear(x, parts["pivot_rows"].weight[expert])
            others = linear(pivots, parts["pivot_coef"].weight[expert])
            both = torch.cat([pivots, others], dim=-1)
            places = self._places(self.pivot_index, both.shape[-1])
            return both.index_select(-1, places[expert])
        own = {name: tensor[expert] for name, tensor in self.named_parameters()}
        own.update((name, tensor[expert]) for name, tensor in self.named_buffers())
        y: torch.Tensor = functional_call(self._layer[0], own, (x,))
        return y


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module below another that a dotted name's last part belongs to, made where it is missing."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, leaf


class SharedInput(nn.Module):
    """W_e = private_e shared_g: the experts of a group project their input in one way."""

    def __init__(
        self, experts: int, outputs: int, inputs: int, *, rank: int, groups: int, **_: Any
    ) -> None:
        super().__init__()
        self.private = nn.Parameter(torch.empty(experts, outputs, rank))
        self.shared = nn.Parameter(torch.empty(groups, rank, inputs))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        group = expert * len(self.shared) // len(self.private)
        return linear(linear(x, self.shared[group]), self.private[expert])


class SharedOutput(nn.Module):
    """W_e = shared_g private_e: the experts of a group write their output in one way."""

    def __init__(
        self, experts: int, outputs: int, inputs: int, *, rank: int, groups: int, **_: Any
    ) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.empty(groups, outputs, rank))
        self.private = nn.Parameter(torch.empty(experts, rank, inputs))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        group = expert * len(self.shared) // len(self.private)
        return linear(linear(x, self.private[expert]), self.shared[group])


class Delta(nn.Module):
    """W_e = base + left_e right_e; what the base does to a token is computed once, not by each of its experts."""

    def __init__(self, experts: int, outputs: int, inputs: int, *, rank: int, **_: Any) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.empty(outputs, inputs))
        self.left = nn.Parameter(torch.empty(experts, outputs, rank))
        self.right = nn.Parameter(torch.empty(experts, rank, inputs))

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """What an expert adds to the base's outputs."""
        return linear(linear(x, self.right[expert]), self.left[expert])


class Bases(nn.Module):
    """W_e = private_e f(sum_j mix_ej basis_j), or its transpose; a basis may itself be of low rank.

    A basis of rank K is a product of [R, K] and [K, I] whose first factor has rows of the identity where
    ``pivots`` says; the others are ``left``.
    """

    def __init__(
        self,
        experts: int,
        outputs: int,
        inputs: int,
        *,
        inner: int,
        bases: int,
        rank: int = 0,
        activation: str = "silu",
        transposed: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        if transposed:
            outputs, inputs = inputs, outputs
        self.activation: Any = {"silu": silu, "tanh": torch.tanh}[activation]
        self.transposed, self.inner = transposed, inner
        self.private = nn.Parameter(torch.empty(experts, outputs, inner))
        self.mix = nn.Parameter(torch.empty(experts, bases))
        if rank:
            self.left = nn.Parameter(torch.empty(bases, inner - rank, rank))
            self.right = nn.Parameter(torch.empty(bases, rank, inputs))
            self.register_buffer("pivots", torch.zeros(bases, rank, dtype=torch.int32))
        else:
            self.bases = nn.Parameter(torch.empty(bases, inner, inputs))

    def stack(self) -> torch.Tensor:
        """All bases [M, R, I], which serve all experts of a call."""
        if "bases" in self._parameters:
            return self.bases
        pivots: Any = self.pivots
        count, rank = pivots.shape
        chosen = torch.zeros(count, self.inner, dtype=torch.long, device=pivots.device)
        chosen.scatter_(1, pivots.long(), 1)
        # The place of every row among pivots followed by others, both ascending.
        order = torch.where(chosen.bool(), chosen.cumsum(1) - 1, rank + (1 - chosen).cumsum(1) - 1)
        both = torch.cat([self.right, self.left @ self.right], dim=1)
        return both.gather(1, order[:, :, None].expand(-1, -1, both.shape[2]))

    def forward(self, x: torch.Tensor, expert: int, bases: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("m,mri->ri", self.mix[expert], bases)
        core = self.activation(mixed)
        if self.transposed:
            return linear(linear(x, self.private[expert].T), core.T)
        return linear(linear(x, core), self.private[expert])


FORMS: dict[str, type[nn.Module]] = {
    "whole": Whole,
    "input": SharedInput,
    "output": SharedOutput,
    "delta": Delta,
    "bases": Bases,
}
FORMS_OF_EACH = (*LOWRANK, *MIXED)


class SharedExperts(nn.Module):
    """Stands for a stock mixture's experts: called with tokens, the experts each goes to, and their weights."""

    def __init__(
        self, experts: int, width: int, hidden: int, act_fn: Any, entry: dict[str, Any]
    ) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts, act_fn
        for part in ("gate", "up", "down"):
            options = dict(entry[part])
            kind: Any = Each
            if options["form"] in FORMS:
                kind = FORMS[options.pop("form")]
            shape = (hidden, width) if part == "down" else (width, hidden)
            setattr(self, part, kind(experts, *shape, **options))

    def forward(
        self, hidden_states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states)
        gate, up, down = (self._ready(part) for part in ("gate", "up", "down"))
        bases = self._bases()
        gates, ups = (
            linear(hidden_states, bases[part]) if part in bases else None for part in ("gate", "up")
        )
        summed: Any = None
        for expert in torch.unique(index).tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(index == expert)
            given, weight = hidden_states[token], weights[token, slot, None]
            gated, upped = gate(given, expert), up(given, expert)
            if gates is not None:
                gated = gated + gates[token]
            if ups is not None:
                upped = upped + ups[token]
            hidden = self.act_fn(gated) * upped
            if "down" in bases:
                hidden = hidden * weight.to(hidden.dtype)
                if summed is None:
                    summed = hidden.new_zeros(len(hidden_states), hidden.shape[1])
                summed.index_add_(0, token, hidden)
                part = down(hidden, expert)
            else:
                part = down(hidden, expert) * weight
            output.index_add_(0, token, part.to(output.dtype))
        return output if summed is None else output + linear(summed, bases["down"])

    def _bases(self) -> dict[str, torch.Tensor]:
        """Of the projections that are a base and changes, the base."""
        parts: Any = self._modules
        return {
            part: parts[part].base
            for part in ("gate", "up", "down")
            if isinstance(parts[part], Delta)
        }

    def _ready(self, part: str) -> Any:
        """A projection to call with tokens and an expert, with what serves all experts worked out once."""
        found: Any = self._modules[part]
        if isinstance(found, Bases):
            return partial(found, bases=found.stack())
        return found


def apply(body: Any, config: Any) -> None:
    """Put experts of parts in the place of the stock ones of the listed layers.

    Args:
        body: the stock base model, changed in place.
        config: its ``moesurg_shared_experts`` has ``experts``: the name of the experts' module below a layer; and
            ``layers``: by index, for ``gate``, ``up`` and ``down`` a ``form`` of FORMS or FORMS_OF_EACH with its sizes.

    Raises:
        ValueError: an unknown form.
    """
    entry = getattr(config, KEY)
    place, _, leaf = entry["experts"].rpartition(".")
    for index, parts in entry["layers"].items():
        for part in ("gate", "up", "down"):
            if parts[part].get("form") not in (*FORMS, *FORMS_OF_EACH):
                raise ValueError(f"config.json: {KEY}: {part} of layer {index} has an unknown form")
        layer = body.layers[int(index)]
        stock: Any = layer.get_submodule(entry["experts"])
        count, hidden, width = stock.down_proj.shape
        new = SharedExperts(count, width, hidden, stock.act_fn, parts)
        setattr(layer.get_submodule(place), leaf, new.to(stock.down_proj.dtype))
