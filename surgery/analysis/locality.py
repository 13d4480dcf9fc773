"""Whether routing stays with the same experts from token to token: two measures of arXiv:2505.16056, on traces.

T counts the tokens of a sequence, K the experts a token selects, E the experts, m the tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.integer]


class Prediction(NamedTuple):
    """The best threshold rule for windows.

    Attributes:
        srp: segment routing best performance, the largest F1, 0 to 1.
        ratio: activations predicted by that rule, over those that happen; 0 where none happens.
        threshold: selections in a window from which the rule keeps an expert for all of it.
    """

    srp: float
    ratio: float
    threshold: int


def window_counts(trace_TK: Ids, experts: int, window: int) -> NDArray[np.int64]:
    """How often each expert is selected f times in a window: [E, m + 1], over all overlapping windows.

    A sequence shorter than the window has none, and no window crosses from one sequence into another.
    """
    import numpy as np

    counts = np.zeros((experts, window + 1), np.int64)
    tokens = len(trace_TK)
    if tokens < window:
        return counts
    active_TE = np.zeros((tokens + 1, experts), np.int64)
    np.add.at(active_TE[1:], (np.arange(tokens)[:, None], trace_TK), 1)
    total_TE = active_TE.cumsum(axis=0)
    found_WE = total_TE[window:] - total_TE[:-window]
    for expert in range(experts):
        counts[expert] = np.bincount(found_WE[:, expert], minlength=window + 1)
    return counts


def best_prediction(counts_EF: NDArray[np.integer]) -> Prediction:
    """SRP of a group of experts from the sum of their windows' histograms.

    For every threshold a: an expert is kept for a window if at least a of its m tokens select it. With n_f windows
    of f selections, match = sum f n_f over f >= a, predicted = m sum n_f over f >= a, happening = sum f n_f, and
    F1 = 2 match / (predicted + happening), the sums running over all experts before they are divided. The best
    common threshold counts; ties go to the larger one, which keeps less.
    """
    import numpy as np

    n_F = counts_EF.sum(axis=0).astype(np.float64)
    window = len(n_F) - 1
    f_F = np.arange(window + 1)
    match_F = np.cumsum((f_F * n_F)[::-1])[::-1]
    predicted_F = window * np.cumsum(n_F[::-1])[::-1]
    happening = match_F[0]
    f1_F = 2 * match_F / np.maximum(predicted_F + happening, 1.0)
    best = int(len(f1_F) - 1 - np.argmax(f1_F[::-1]))
    ratio = float(predicted_F[best] / happening) if happening else 0.0
    return Prediction(float(f1_F[best]), ratio, best)


def cache_hits(traces: Sequence[Ids], experts: int, capacity: int, window: int) -> float:
    """SCH: the share of selections that find their expert in a cache of ``capacity`` experts, 0 to 1.

    Tokens pass in order, and of each its selections in the router's order. A selection of a resident expert is a hit.
    Otherwise the expert is loaded, in the place of the resident one with the fewest selections left in the window of
    m tokens that begins with the current token (whose selections are taken off as they pass), and of those the
    least recently used. A first selection while places are free counts as a hit, so that a cache of all experts hits
    always.

    Deviation: the paper does not say what happens between samples; here each sequence begins with an empty cache.
    """
    hits = total = 0
    for trace_TK in traces:
        rows = trace_TK.tolist()
        left = [0] * experts
        for row in rows[: window - 1]:
            for expert in row:
                left[expert] += 1
        resident: dict[int, None] = {}  # in order of use, the oldest first
        for place, row in enumerate(rows):
            if place + window - 1 < len(rows):
                for expert in rows[place + window - 1]:
                    left[expert] += 1
            for expert in row:
                total += 1
                if expert in resident:
                    hits += 1
                    del resident[expert]
                elif len(resident) < capacity:
                    hits += 1
                else:
                    # The first of the smallest is the least recently used of them.
                    del resident[min(resident, key=left.__getitem__)]
                resident[expert] = None
                left[expert] -= 1
    return hits / total if total else 0.0


def interval(
    histograms_SEF: NDArray[np.integer], rng: np.random.Generator, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of SRP when sequences are drawn again with replacement.

    Args:
        histograms_SEF: :func:`window_counts` of every sequence, [S, E, m + 1].
    """
    import numpy as np

    n_SF = histograms_SEF.sum(axis=1)
    picked = rng.multinomial(len(n_SF), np.full(len(n_SF), 1 / len(n_SF)), size=draws)
    found = [best_prediction(n_F[None]).srp for n_F in picked @ n_SF]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
