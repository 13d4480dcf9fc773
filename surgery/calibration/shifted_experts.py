"""The experts' part of `shifted.py`: inputs of the original and of the compressed model on the same tokens.

Once matrices are replaced, the two models' routers select other experts for some tokens, so an expert's own inputs in
both are of other tokens. Here every token goes to the experts that the original model selects, in both:

    gate, up    X and Y are all inputs of the mixture, as for ``svd-llm``,
    down        X_e and Y_e are expert e's hidden activations on the tokens that the original router sends it, in the
                second model with its gate and up already replaced and its own inputs.

Sums are float64, stored in float32 under the names that `linears.expert_input` gives. An expert that no token selects
has matrices of zeros. Two passes over the text for a layer; memory holds two matrices an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..architectures.base import PROJECTIONS
from ..architectures.linears import expert_input
from ..architectures.model import Experts
from ..errors import InputError, MoesurgError
from ..plan import Unit
from .forward import Step
from .sequences import Batch

Replacement = Callable[[Unit, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Wanted = Mapping[tuple[int, str], Unit]
"""Units by expert and projection."""


class _Enough(Exception):
    """Ends a forward whose mixture has been called."""


class ShiftedExperts:
    """One layer's experts in both models.

    Attributes:
        stored: Y^T Y and X^T Y (the latter with a final ``.cross``) by the name of the input, float32.
        rows: how many inputs each sums.
    """

    def __init__(self, one: Step, other: Step) -> None:
        experts = one.layer.experts
        if experts is None or experts.stock.call != "routed" or experts.layout.parts != PROJECTIONS:
            raise InputError(
                f"layer {one.index}: its experts are not three matrices without biases, called by index"
            )
        self.experts: Experts = experts
        self._steps = (one, other)
        self.stored: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}

    def collect(self, wanted: Wanted, replacement: Replacement) -> None:
        """Add up what the wanted matrices need, and replace them in the second model on the way.

        Raises:
            InputError: an input is not finite.
        """
        parts = {part for _, part in wanted}
        if parts & {"gate", "up"}:
            self._inputs()
            self._replace(wanted, ("gate", "up"), replacement)
        if "down" in parts:
            self._hidden()
            self._replace(wanted, ("down",), replacement)

    def _inputs(self) -> None:
        size = self.experts.hidden
        sums = _Sums(size, self._device)
        for batch in self._steps[0].run.batches:
            x_TD, y_TD, _, real_T = self._seen(batch)
            sums.add(x_TD[real_T], y_TD[real_T])
        self._keep(expert_input(), sums)

    def _hidden(self) -> None:
        one, other = (self._module(step) for step in self._steps)
        sums = [_Sums(self.experts.width, self._device) for _ in range(self.experts.count)]
        for batch in self._steps[0].run.batches:
            x_TD, y_TD, index_TK, real_T = self._seen(batch)
            for expert in torch.unique(index_TK[real_T]).tolist():
                token_N = torch.where((index_TK == expert).any(dim=1) & real_T)[0]
                sums[expert].add(
                    _activations(one, expert, x_TD[token_N]),
                    _activations(other, expert, y_TD[token_N]),
                )
        for expert, found in enumerate(sums):
            self._keep(expert_input(expert), found)

    def _replace(self, wanted: Wanted, parts: tuple[str, ...], replacement: Replacement) -> None:
        module, width = self._module(self._steps[1]), self.experts.width
        for (expert, part), unit in wanted.items():
            if part not in parts:
                continue
            name = expert_input(expert if part == "down" else None)
            if part == "down":
                weight = module.down_proj.data[expert]
            else:
                first = width if part == "up" else 0
                weight = module.gate_up_proj.data[expert, first : first + width]
            # From the stored matrices, as the run's unit will make it.
            new = replacement(unit, weight.cpu(), self.stored[name], self.stored[f"{name}.cross"])
            weight.copy_(new)

    def _keep(self, name: str, sums: _Sums) -> None:
        if not bool(torch.isfinite(sums.gram).all() and torch.isfinite(sums.cross).all()):
            raise InputError(
                f"layer {self._steps[0].index}: the inputs of {name} are not finite on this text",
                hint="the weights are damaged, or the compression is too strong",
            )
        self.stored[name] = ((sums.gram + sums.gram.T) / 2).float().cpu().contiguous()
        self.stored[f"{name}.cross"] = sums.cross.float().cpu().contiguous()
        self.rows[name] = self.rows[f"{name}.cross"] = sums.rows

    def _seen(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mixture's inputs in both models [T, D], what the first selects [T, K], and which tokens are real."""
        (x_TD, index_TK), (y_TD, _) = (self._given(step, batch) for step in self._steps)
        return x_TD, y_TD, index_TK, self._steps[0].run.mask(batch).flatten()

    def _given(self, step: Step, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[torch.Tensor] = []

        def see(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            seen.extend([*args, *kwargs.values()][:2])
            raise _Enough

        handle = self._module(step).register_forward_pre_hook(see, with_kwargs=True)
        try:
            step.forward(batch)
        except _Enough:
            pass
        finally:
            handle.remove()
        if len(seen) != 2:
            raise MoesurgError(f"layer {step.index}: the stock forward does not call its experts")
        return seen[0], seen[1]

    def _module(self, step: Step) -> Any:
        return step.module.get_submodule(self.experts.stock.modules[1])

    @property
    def _device(self) -> torch.device:
        return self._steps[0].run.stream.device


class _Sums:
    """Y^T Y and X^T Y, float64, of rows that come in pieces."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.gram, self.cross = (
            torch.zeros(size, size, dtype=torch.float64, device=device) for _ in range(2)
        )
        self.rows = 0

    def add(self, x_NF: torch.Tensor, y_NF: torch.Tensor) -> None:
        wide_NF = y_NF.double()
        self.gram.addmm_(wide_NF.T, wide_NF)
        self.cross.addmm_(x_NF.double().T, wide_NF)
        self.rows += len(y_NF)


def _activations(module: Any, expert: int, given_ND: torch.Tensor) -> torch.Tensor:
    """What an expert's down projection is given [N, F]."""
    both_N2F = torch.nn.functional.linear(given_ND, module.gate_up_proj[expert])
    gate_NF, up_NF = both_N2F.chunk(2, -1)
    hidden_NF: torch.Tensor = module.act_fn(gate_NF) * up_NF
    return hidden_NF


def by_layer(units: Iterator[Unit]) -> dict[int | None, dict[tuple[int, str], Unit]]:
    """Units of experts' matrices by layer, expert and projection."""
    found: dict[int | None, dict[tuple[int, str], Unit]] = {}
    for unit in units:
        found.setdefault(unit.layer, {})[unit.params["expert"], unit.params["role"]] = unit
    return found
