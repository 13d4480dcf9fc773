"""The fields of the statistics of one MoE layer, and what methods compute from them. Needs no
torch.

Fields are float64 sums over tokens, so that domains add up. E counts experts, D is the model width.
For a token, g_i is the coefficient that multiplies the output f_i of a selected expert (0 where it
is not selected), and n_i = ||f_i||. Where the router scales what experts are given (Llama 4), f_i is
the expert's part of the layer's output divided by g_i, so that g_i f_i is that part in every
family. The letters after a name are its dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

ROUTED = (
    "tokens",  # number of tokens
    "count_E",  # tokens that select the expert
    "gate_E",  # sum g
    "gate2_E",  # sum g^2
    "norm_E",  # sum n, over tokens that select the expert, as all sums of outputs in this list
    "norm2_E",  # sum n^2
    "gate_norm_E",  # sum g n
    "gate2_norm_E",  # sum g^2 n
    "gate2_norm2_E",  # sum g^2 n^2
    "max_abs_E",  # largest |element of f|; the one field that is a maximum and no sum
    "pair_count_EE",  # tokens that select both
    "pair_activation_EE",  # sum (g_i n_i) (g_j n_j)
    "ratio_EE",  # sum g_i / (g_i + g_j) over tokens that select both; diagonal 0
    "ratio2_EE",  # sum of the squares of that
    "logit_E",  # sum of raw router logits
    "logit_gram_EE",  # sum l_i l_j of raw router logits
    "routed_output_ED",  # sum f
)
ALL_EXPERT = (
    "output_ED",  # sum f_i over all tokens
    "output_gram_EE",  # sum <f_i, f_j> over all tokens
    "output_cosine_EE",  # sum cos(f_i, f_j) over all tokens
)
OPTIONAL = ("input_gram_DD",)  # sum x x^T of the mixture's inputs
MAXIMA = frozenset({"max_abs_E"})
HALVES = (
    "tokens",
    "count_E",
    "gate_E",
    "gate2_E",
    "norm_E",
    "norm2_E",
    "gate_norm_E",
    "gate2_norm_E",
    "gate2_norm2_E",
)
"""Fields that are also summed over every second sequence of a domain alone, to see how stable scores are."""


def shape_of(field: str, experts: int, hidden: int) -> tuple[int, ...]:
    """The shape its name gives a field."""
    letters = field.rpartition("_")[2]
    sizes = {"E": experts, "D": hidden}
    return tuple(sizes[letter] for letter in letters) if set(letters) <= set(sizes) else ()


@dataclass(frozen=True)
class LayerStatistics:
    """Sums of one layer over the chosen domains, in float64.

    Fields that only the all-expert mode or an option collects are None when absent; the properties
    that need them say so in their error.
    """

    index: int
    tokens: float
    count_E: Array
    gate_E: Array
    gate2_E: Array
    norm_E: Array
    norm2_E: Array
    gate_norm_E: Array
    gate2_norm_E: Array
    gate2_norm2_E: Array
    max_abs_E: Array
    pair_count_EE: Array
    pair_activation_EE: Array
    ratio_EE: Array
    ratio2_EE: Array
    logit_E: Array
    logit_gram_EE: Array
    routed_output_ED: Array
    output_ED: Array | None = None
    output_gram_EE: Array | None = None
    output_cosine_EE: Array | None = None
    input_gram_DD: Array | None = None

    @property
    def frequency_E(self) -> Array:
        """Share of all selections that go to each expert; sums to 1."""
        share_E: Array = self.count_E / self.count_E.sum()
        return share_E

    @property
    def output_mean_ED(self) -> Array:
        """Mean output of every expert over all tokens, routing ignored."""
        return self._need(self.output_ED) / self.tokens

    @property
    def output_gram_mean_EE(self) -> Array:
        """Mean over all tokens of <f_i, f_j>."""
        return self._need(self.output_gram_EE) / self.tokens

    @property
    def output_cosine_mean_EE(self) -> Array:
        """Mean over all tokens of cos(f_i, f_j): 1 on the diagonal, 0 where an output is zero."""
        return self._need(self.output_cosine_EE) / self.tokens

    @property
    def routed_output_mean_ED(self) -> Array:
        """Mean output over the tokens that select the expert; 0 for an expert that none does."""
        import numpy as np

        return self.routed_output_ED / np.maximum(self.count_E, 1.0)[:, None]

    @property
    def logit_cosine_EE(self) -> Array:
        """Cosine between the raw logits of two experts; 0 where one is always zero."""
        return _cosine(self.logit_gram_EE)

    @property
    def ratio_variance_EE(self) -> Array:
        """Variance of g_i / (g_i + g_j) over tokens that select both; 0 where none does."""
        import numpy as np

        count_EE = np.maximum(self.pair_count_EE, 1.0)
        mean_EE = self.ratio_EE / count_EE
        return np.maximum(self.ratio2_EE / count_EE - mean_EE**2, 0.0)

    def _need(self, field: Array | None) -> Array:
        if field is None:
            raise InputError(
                f"layer {self.index}: the method needs all-expert statistics, these are of routed "
                "experts only",
                hint="rerun calibrate without --routed-only",
            )
        return field


def _cosine(gram_EE: Array) -> Array:
    import numpy as np

    norm_E = np.sqrt(np.diagonal(gram_EE))
    product_EE = np.outer(norm_E, norm_E)
    cosine_EE = np.divide(gram_EE, product_EE, out=np.zeros_like(gram_EE), where=product_EE > 0)
    clipped_EE: Array = np.clip(cosine_EE, -1.0, 1.0)
    return clipped_EE
