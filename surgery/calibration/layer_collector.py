"""What one mixture adds up while a text passes through its layer.

The stock router decides: its own indices and weights reach a module that stands for the stock experts, computes their
outputs from the stock weights in the stock order, and adds up what `statistics.py` defines. Padding takes part in
nothing. The router's raw logits are read by a hook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from ..architectures.model import Experts
from ..errors import InputError, MoesurgError
from .blocks import recast
from .forward import Step
from .layer_statistics import HALVES, shape_of
from .sequences import Batch, Sequences
from .sums import Sums, by_expert

if TYPE_CHECKING:
    from numpy.typing import NDArray

Mode = Literal["all", "routed"]


def collector_of(
    step: Step, *, mode: Mode, gram: bool, trace: bool, sampled: NDArray[np.int64]
) -> LayerCollector | None:
    """What adds up a mixture's statistics; None for a dense layer."""
    if step.layer.experts is None:
        return None
    run = step.run
    return LayerCollector(
        step.layer.experts,
        step.index,
        run.sequences,
        run.stream.device,
        mode=mode,
        gram=gram,
        trace=trace,
        sampled=sampled,
    )


class LayerCollector:
    """What one MoE layer adds up while its batches pass.

    Args:
        facts: the layer's experts.
        index: the layer.
        sequences: for the number of domains.
        sampled: places of the tokens whose inputs are kept, ascending.
    """

    def __init__(
        self,
        facts: Experts,
        index: int,
        sequences: Sequences,
        device: torch.device,
        *,
        mode: Mode,
        gram: bool,
        trace: bool,
        sampled: NDArray[np.int64],
    ) -> None:
        self.index, self.mode, self.sampled = index, mode, sampled
        self.stock = facts.stock
        self.sums = [
            Sums(facts.count, facts.hidden, all_experts=mode == "all", gram=gram, device=device)
            for _ in sequences.domains
        ]
        self.halves: list[dict[str, torch.Tensor]] = [
            {
                name: torch.zeros(shape_of(name, facts.count, facts.hidden), dtype=torch.float64)
                for name in HALVES
            }
            for _ in sequences.domains
        ]
        self._sequences_seen = [0] * len(sequences.domains)
        self.trace: list[torch.Tensor] | None = [] if trace else None
        self.inputs: list[torch.Tensor] = []
        self.batch: Batch | None = None
        self._logits_TE: torch.Tensor | None = None

    def attach(self, module: nn.Module) -> None:
        """Put the collector into a materialised layer."""
        router, experts = recast(module, self.stock)
        module.get_submodule(router).register_forward_hook(self._see_logits)
        module.set_submodule(experts, CollectingExperts(module.get_submodule(experts), self))

    def begin(self, batch: Batch) -> None:
        """Tell which batch comes next."""
        self.batch = batch

    def _see_logits(self, module: nn.Module, args: object, output: Any) -> None:
        self._logits_TE = output[0] if isinstance(output, tuple) else output

    def add(
        self,
        experts: CollectingExperts,
        input_TD: torch.Tensor,
        index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        norm_TK: torch.Tensor,
        real_T: torch.Tensor,
    ) -> None:
        """The real tokens of a batch, after their routed outputs."""
        batch, logits_TE = self.batch, self._logits_TE
        if batch is None or logits_TE is None or logits_TE.shape[0] != len(real_T):
            raise MoesurgError(f"layer {self.index}: the router's logits were not seen")
        sums = self.sums[batch.domain]
        input_TD, index_TK = input_TD[real_T], index_TK[real_T]
        sums.add_routing(index_TK, weight_TK[real_T], norm_TK[real_T], logits_TE[real_T])
        self._add_half(batch, index_TK, weight_TK[real_T], norm_TK[real_T])
        sums.add_inputs(input_TD)
        if self.mode == "all":
            weight_TE = logits_TE[real_T].float().sigmoid().to(input_TD.dtype)

            def output(expert: int, rows: slice) -> torch.Tensor:
                return experts.output(expert, input_TD[rows], weight_TE[rows, expert])

            sums.add_all_outputs(len(input_TD), output)
        if self.trace is not None:
            self.trace.append(index_TK.cpu())
        first, last = np.searchsorted(self.sampled, (batch.start, batch.stop))
        if first < last:
            rows = torch.from_numpy(self.sampled[first:last] - batch.start).to(input_TD.device)
            self.inputs.append(input_TD[rows].float().cpu())
        self._logits_TE = None

    def _add_half(
        self, batch: Batch, index_TK: torch.Tensor, gate_TK: torch.Tensor, norm_TK: torch.Tensor
    ) -> None:
        """Every second sequence of a domain once more, by itself."""
        begin = self._sequences_seen[batch.domain]
        self._sequences_seen[batch.domain] += len(batch.lengths)
        odd = (torch.arange(len(batch.lengths)) + begin) % 2 == 1
        half_T = torch.repeat_interleave(odd, torch.tensor(batch.lengths))
        index_TK, gate_TK, norm_TK = (each.cpu()[half_T] for each in (index_TK, gate_TK, norm_TK))
        experts = self.sums[batch.domain].experts
        for name, value in by_expert(index_TK, gate_TK.double(), norm_TK.double(), experts).items():
            self.halves[batch.domain][name] += value

    def tensors(self, sequences: Sequences) -> dict[str, NDArray[np.generic]]:
        """The layer's arrays by their names in the file.

        Raises:
            InputError: a sum is not finite.
        """
        found: dict[str, NDArray[np.generic]] = {}
        for domain, sums in zip(sequences.domains, self.sums, strict=True):
            bad = sums.non_finite()
            if bad is not None:
                raise not_finite(self.index, bad[1], f"{bad[0]} of domain {domain!r}")
            for name, value in sums.fields.items():
                found[f"layers.{self.index}.{domain}.{name}"] = value.cpu().numpy()
        for domain, half in zip(sequences.domains, self.halves, strict=True):
            for name, value in half.items():
                found[f"halves.{self.index}.{domain}.{name}"] = value.numpy()
        if self.trace is not None:
            experts = self.sums[0].experts
            kind = np.uint8 if experts <= 256 else np.uint16
            found[f"trace.{self.index}"] = torch.cat(self.trace).numpy().astype(kind)
        if len(self.sampled):
            found[f"inputs.{self.index}"] = torch.cat(self.inputs).numpy()
        return found


class CollectingExperts(nn.Module):
    """Stands for the stock experts: the same outputs, bit for bit, seen by a collector."""

    def __init__(self, stock: nn.Module, collector: LayerCollector) -> None:
        super().__init__()
        self.stock: Any = stock
        self.collector = collector

    def output(self, expert: int, input_TD: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
        """f_e of [T, D] inputs; what weights multiply inputs, f_e(w x) / w, so that w times it is what is added."""
        if self.collector.stock.call == "scaled":
            found = self._plain(expert, input_TD * weight_T[:, None])
            return torch.where(weight_T[:, None] > 0, found / weight_T[:, None], 0.0)
        if self.collector.stock.interleaved:  # neither plain matrices nor a plain activation
            index_T1 = torch.full((len(input_TD), 1), expert, device=input_TD.device)
            ones_T1 = torch.ones(index_T1.shape, dtype=input_TD.dtype, device=input_TD.device)
            given: torch.Tensor = self.stock(input_TD, index_T1, ones_T1)
            return given
        return self._plain(expert, input_TD)

    def _plain(self, expert: int, input_TD: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = nn.functional.linear(input_TD, self.stock.gate_up_proj[expert]).chunk(
            2, -1
        )
        hidden_TF = self.stock.act_fn(gate_TF) * up_TF
        return nn.functional.linear(hidden_TF, self.stock.down_proj[expert])

    def forward(
        self, input_TD: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """The routed mixture of a batch, [T, D]; what stock transformers computes."""
        collector = self.collector
        if collector.batch is None:
            raise MoesurgError(f"layer {collector.index}: a batch was not announced")
        mask_BT = torch.from_numpy(collector.batch.mask_BT)
        real_T = mask_BT.to(input_TD.device).flatten()
        sums = collector.sums[collector.batch.domain]
        mixed_TD = torch.zeros_like(input_TD)
        norm_TK = torch.zeros(index_TK.shape, dtype=torch.float64, device=input_TD.device)
        for expert in torch.unique(index_TK).tolist():
            slot_N, token_N = torch.where(expert == index_TK.T)
            weight_N = weight_TK[token_N, slot_N]
            output_ND = self.output(expert, input_TD[token_N], weight_N)
            weighted_ND = output_ND * weight_N[:, None]
            mixed_TD.index_add_(0, token_N, weighted_ND.to(mixed_TD.dtype))
            norm_N = torch.linalg.vector_norm(output_ND, dim=-1, dtype=torch.float64)
            norm_TK[token_N, slot_N] = norm_N
            real_N = real_T[token_N]
            if not bool(torch.isfinite(norm_N[real_N]).all()):
                raise not_finite(collector.index, expert, "output")
            sums.add_routed_output(expert, output_ND[real_N])
        collector.add(self, input_TD, index_TK, weight_TK, norm_TK, real_T)
        return mixed_TD


def not_finite(layer: int, expert: int, what: str) -> InputError:
    """The error that names the culprit of a value that is not finite."""
    return InputError(
        f"layer {layer}, expert {expert}: its {what} is not finite on this text",
        hint="the weights are damaged, or too large for the compute dtype",
    )
