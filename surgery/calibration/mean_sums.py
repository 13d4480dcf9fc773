"""What a layer's feed-forward is given, summed by domain while the text passes through it (see `means`)."""

from __future__ import annotations

from typing import Any

import torch

from ..architectures.model import Layer
from ..errors import InputError
from .forward import Step
from .sequences import Batch


class _Sums:
    """What one layer's feed-forward and its down projection are given, by domain."""

    def __init__(self, step: Step, mode: str, sample: int) -> None:
        domains = len(step.run.sequences.domains)
        hidden, device = step.run.stream.model.config.hidden, step.run.stream.device
        self.step, self.mode = step, mode
        self.total_CD = torch.zeros(domains, hidden, dtype=torch.float64, device=device)
        width = step.layer.ffn["gate"].shape[0]
        self.neurons_CF = torch.zeros(domains, width, dtype=torch.float64, device=device)
        self.rows, self.read = [0] * domains, [0] * domains
        self.tokens = [0] * domains
        for batch in step.run.batches:
            self.tokens[batch.domain] += batch.stop - batch.start
        self.sample = sample
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(domains)]
        self.numbers: list[list[torch.Tensor]] = [[] for _ in range(domains)]
        self.batch: Batch | None = None

    def begin(self, batch: Batch) -> None:
        self.batch = batch

    def see(self, module: Any, args: tuple[Any, ...]) -> None:
        """The feed-forward's input."""
        batch = self.batch
        if batch is None:
            return
        domain, count = batch.domain, len(batch.lengths)
        rows_ND = self._real(batch, args[0])
        length_B = torch.tensor(batch.lengths)
        wide_ND = rows_ND.double()
        if self.mode == "prompts":
            share_N = (1 / length_B.double()).repeat_interleave(length_B)
            wide_ND = wide_ND * share_N[:, None].to(wide_ND.device)
        self.total_CD[domain] += wide_ND.sum(dim=0)
        keep_N = _kept(self.rows[domain], len(rows_ND), self.tokens[domain], self.sample)
        number_N = torch.arange(self.read[domain], self.read[domain] + count)
        number_N = number_N.repeat_interleave(length_B)
        self.kept[domain].append(rows_ND[keep_N.to(rows_ND.device)].float().cpu())
        self.numbers[domain].append(number_N[keep_N])
        self.rows[domain] += len(rows_ND)
        self.read[domain] += count

    def see_neurons(self, module: Any, args: tuple[Any, ...]) -> None:
        """The down projection's input."""
        if self.batch is not None:
            rows_NF = self._real(self.batch, args[0])
            self.neurons_CF[self.batch.domain] += rows_NF.abs().double().sum(dim=0)

    def _real(self, batch: Batch, given: Any) -> torch.Tensor:
        mask_T = self.step.run.mask(batch).flatten()
        rows_ND: torch.Tensor = given.reshape(-1, given.shape[-1])[mask_T]
        return rows_ND

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer's file holds.

        Raises:
            InputError: a domain without a token.
        """
        empty = [number for number, rows in enumerate(self.rows) if not rows]
        if empty:
            raise InputError(
                f"domain {empty[0] + 1} of the text gives no token", hint="ask for more --tokens"
            )
        rows_C1 = torch.tensor(self.rows, dtype=torch.float64)[:, None]
        read_C1 = torch.tensor(self.read, dtype=torch.float64)[:, None]
        count_C1 = read_C1 if self.mode == "prompts" else rows_C1
        found = {"mean": (self.total_CD.cpu() / count_C1).contiguous()}
        if self.mode == "neurons":
            found["neurons"] = (self.neurons_CF.cpu() / rows_C1).contiguous()
        for domain, kept in enumerate(self.kept):
            found[f"sample.{domain}"] = torch.cat(kept).contiguous()
            found[f"sequence.{domain}"] = torch.cat(self.numbers[domain]).contiguous()
        return found


def _kept(first: int, count: int, tokens: int, sample: int) -> torch.Tensor:
    """Which of a domain's tokens ``first`` to ``first + count`` are of the sample: bool [count].

    Exactly min(``sample``, ``tokens``) of all are, evenly spread.
    """
    place_N = torch.arange(first, first + count)
    size = min(sample, tokens)
    return (place_N + 1) * size // tokens > place_N * size // tokens


def observe(step: Step, mode: str, sample: int) -> dict[str, torch.Tensor]:
    """Advance a layer and return the tensors of its file.

    Args:
        step: the layer, not yet advanced.
        mode: one of `means.MODES`.
        sample: tokens of each domain that are kept, or all it has.

    Raises:
        InputError: a domain without a token.
    """
    sums = _Sums(step, mode, sample)
    hooks = [("gate", sums.see)]
    if mode == "neurons":
        hooks.append(("down", sums.see_neurons))
    handles = [
        step.module.get_submodule(_module(step.layer, role)).register_forward_pre_hook(hook)
        for role, hook in hooks
    ]
    step.advance(sums.begin)
    for handle in handles:
        handle.remove()
    return sums.tensors()


def _module(layer: Layer, role: str) -> str:
    """A projection of the dense feed-forward: the gate's input is the feed-forward's, the down's are the neurons."""
    return layer.ffn[role].tensor.removeprefix(layer.prefix).removesuffix(".weight")
