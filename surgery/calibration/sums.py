"""Sums over the tokens of one MoE layer and one domain, as defined in `statistics.py`.

T tokens, K selected experts a token, E experts, D model width. Everything is added up in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .layer_statistics import ALL_EXPERT, ROUTED, shape_of

OUTPUT_BYTES = 128 << 20
"""Most bytes of float32 outputs of all experts that are held at a time."""

GRAM_BYTES = 32 << 20
"""Most bytes of float64 outputs of all experts that are multiplied at a time."""


def by_expert(
    index_TK: torch.Tensor, g_TK: torch.Tensor, n_TK: torch.Tensor, experts: int
) -> dict[str, torch.Tensor]:
    """The fields of ``HALVES`` of some tokens, from float64 coefficients and output norms on the CPU."""
    found = {"tokens": torch.tensor(float(len(index_TK)), dtype=torch.float64)}
    for name, value_TK in (
        ("count_E", torch.ones_like(g_TK)),
        ("gate_E", g_TK),
        ("gate2_E", g_TK**2),
        ("norm_E", n_TK),
        ("norm2_E", n_TK**2),
        ("gate_norm_E", g_TK * n_TK),
        ("gate2_norm_E", g_TK**2 * n_TK),
        ("gate2_norm2_E", (g_TK * n_TK) ** 2),
    ):
        found[name] = torch.bincount(index_TK.flatten(), value_TK.flatten(), experts)
    return found


class Sums:
    """The fields of one layer and domain.

    Args:
        experts, hidden: E and D.
        all_experts: also keep the fields over every expert's output on every token.
        gram: also keep the Gram matrix of the inputs.
        device: where outputs are summed; what needs only [T, K] numbers is summed on the CPU, whose
            order of additions is fixed.
    """

    def __init__(
        self, experts: int, hidden: int, *, all_experts: bool, gram: bool, device: torch.device
    ) -> None:
        self.experts, self.hidden = experts, hidden
        names = [*ROUTED, *(ALL_EXPERT if all_experts else ())]
        if gram:
            names.append("input_gram_DD")
        self.fields = {
            name: torch.zeros(
                shape_of(name, experts, hidden),
                dtype=torch.float64,
                device=device if name.endswith("D") or name in ALL_EXPERT else "cpu",
            )
            for name in names
        }

    def add_routing(
        self,
        index_TK: torch.Tensor,
        gate_TK: torch.Tensor,
        norm_TK: torch.Tensor,
        logits_TE: torch.Tensor,
    ) -> None:
        """Everything that follows from selections, coefficients, output norms and logits."""
        index_TK = index_TK.cpu()
        g_TK, n_TK = gate_TK.double().cpu(), norm_TK.double().cpu()
        logits_TE = logits_TE.double().cpu()
        ones_TK = torch.ones_like(g_TK)
        add, spread = self._add, self._scatter
        for name, value in by_expert(index_TK, g_TK, n_TK, self.experts).items():
            add(name, value)
        active_TE, activation_TE = spread(index_TK, ones_TK), spread(index_TK, g_TK * n_TK)
        add("pair_count_EE", active_TE.T @ active_TE)
        add("pair_activation_EE", activation_TE.T @ activation_TE)
        add("logit_E", logits_TE.sum(0))
        add("logit_gram_EE", logits_TE.T @ logits_TE)
        self._add_ratios(index_TK, g_TK)

    def _add_ratios(self, index_TK: torch.Tensor, g_TK: torch.Tensor) -> None:
        """R = g_i / (g_i + g_j) over pairs of selected experts; 1/2 where both g are zero."""
        experts, k = self.experts, index_TK.shape[1]
        for first in range(k):
            for second in range(k):
                if first == second:
                    continue
                pair_T = index_TK[:, first] * experts + index_TK[:, second]
                total_T = g_TK[:, first] + g_TK[:, second]
                half_T = torch.full_like(total_T, 0.5)
                r_T = torch.where(total_T > 0, g_TK[:, first] / total_T, half_T)
                for name, value_T in (("ratio_EE", r_T), ("ratio2_EE", r_T**2)):
                    sums = torch.bincount(pair_T, value_T, experts * experts)
                    self._add(name, sums.view(experts, experts))

    def add_routed_output(self, expert: int, output_ND: torch.Tensor) -> None:
        """Outputs of one expert on tokens that select it."""
        if len(output_ND):
            self.fields["routed_output_ED"][expert] += output_ND.sum(0, dtype=torch.float64)
            largest = self.fields["max_abs_E"]
            largest[expert] = max(float(largest[expert]), float(output_ND.abs().max()))

    def add_inputs(self, input_TD: torch.Tensor) -> None:
        """Inputs of the mixture."""
        if "input_gram_DD" in self.fields:
            input_TD = input_TD.double()
            self._add("input_gram_DD", input_TD.T @ input_TD)

    def add_all_outputs(self, tokens: int, expert: Callable[[int, slice], torch.Tensor]) -> None:
        """Outputs of every expert on every token, in blocks of tokens.

        Args:
            tokens: T.
            expert: the outputs [N, D] of one expert on a range of N tokens.
        """
        per_token = self.experts * self.hidden
        block = max(1, OUTPUT_BYTES // (4 * per_token))
        inner = max(1, GRAM_BYTES // (8 * per_token))
        device = self.fields["output_ED"].device
        for start in range(0, tokens, block):
            rows = slice(start, min(start + block, tokens))
            count = rows.stop - rows.start
            shape = (count, self.experts, self.hidden)
            output_TED = torch.empty(shape, dtype=torch.float32, device=device)
            for index in range(self.experts):
                output_TED[:, index] = expert(index, rows)
            for begin in range(0, count, inner):
                self._add_outputs(output_TED[begin : begin + inner].double())

    def _add_outputs(self, output_TED: torch.Tensor) -> None:
        gram_TEE = output_TED @ output_TED.transpose(1, 2)
        norm_TE = gram_TEE.diagonal(dim1=1, dim2=2).sqrt()
        product_TEE = norm_TE[:, :, None] * norm_TE[:, None, :]
        # An expert whose output is zero has no direction: cosine 0 to all others, 1 to itself.
        cosine_TEE = torch.where(product_TEE > 0, gram_TEE / product_TEE, 0.0).clamp(-1.0, 1.0)
        cosine_TEE.diagonal(dim1=1, dim2=2).fill_(1.0)
        self._add("output_ED", output_TED.sum(0))
        self._add("output_gram_EE", gram_TEE.sum(0))
        self._add("output_cosine_EE", cosine_TEE.sum(0))

    def non_finite(self) -> tuple[str, int] | None:
        """The first field with a value that is not finite and the expert concerned, or None."""
        for name, value in self.fields.items():
            good = torch.isfinite(value)
            if not bool(good.all()):
                return name, int((~good).nonzero()[0][0]) if value.ndim else 0
        return None

    def _scatter(self, index_TK: torch.Tensor, value_TK: torch.Tensor) -> torch.Tensor:
        dense_TE = torch.zeros(len(index_TK), self.experts, dtype=torch.float64)
        return dense_TE.scatter_(1, index_TK, value_TK)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self.fields[name] += value
