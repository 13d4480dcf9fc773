"""What a mixture's statistics say of its experts: load, similarity, mergeability, locality, stability of scores.

Everything but router rows and weights comes from a statistics folder that ``moesurg calibrate`` made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..progress import Stop
from ..seeding import stream
from ..weights import Weights
from .locality import best_prediction, cache_hits, interval, window_counts
from .similarity import pairs, router_cosines, summary, weight_cosines
from .stability import stability

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..architectures.model import Layer, Model
    from ..calibration.statistics import LayerStatistics, Statistics
    from ..progress import Progress

WINDOWS = (4, 16, 64, 256)
"""Tokens of a window for SRP."""

LOOK_AHEAD = 16
"""Tokens that SCH's cache looks ahead."""

CACHES = (1, 2, 4)
"""Places of SCH's cache, in multiples of the experts a token selects."""

MET = 16
"""Fewest tokens that must select two experts together for the variance of their shares to say something."""

CACHE_TOKENS = 4096
"""Most tokens whose selections go through the cache, whole sequences evenly spread over the text."""


def analyse(model: Model, statistics: Statistics, progress: Progress) -> dict[str, Any]:
    """All that is measured, JSON values.

    Raises:
        InputError: the statistics are of another model.
    """
    statistics.check_model(model)
    layers = _layers(model, statistics, progress)
    routing = _routing(model, statistics, progress)
    return {
        "statistics": {
            "folder": str(statistics.folder),
            "mode": statistics.mode,
            "domains": statistics.domains,
            "tokens": int(statistics.layer(statistics.layers[0]).tokens),
        },
        "layers": layers,
        "routing": routing,
        "stability": stability(statistics, dropped=max(1, model.experts // 4)),
    }


def _layers(model: Model, statistics: Statistics, progress: Progress) -> list[dict[str, Any]]:
    found = []
    with Weights([model], progress, Stop()) as weights:
        for layer in weights.track(model.moe_layers):
            sums = statistics.layer(layer.index)
            row = {"layer": layer.index, "load": load(sums)}
            row |= _similarities(layer, sums, weights, all_experts=statistics.mode == "all")
            found.append(row)
    return found


def load(sums: LayerStatistics) -> dict[str, Any]:
    """How evenly tokens are spread over experts.

    ``entropy`` is that of the shares of selections in units of log E: 1 where all experts are used equally.
    ``deviation`` is the standard deviation of the experts' shares of tokens (activation frequencies).
    """
    import numpy as np

    share_E = sums.count_E / max(1.0, float(sums.count_E.sum()))
    used_U = share_E[share_E > 0]
    experts = len(share_E)
    entropy = float(-(used_U * np.log(used_U)).sum())
    return {
        "entropy": entropy / float(np.log(experts)) if experts > 1 else 1.0,
        "largest_share": float(share_E.max()),
        "smallest_share": float(share_E.min()),
        "deviation": float((sums.count_E / max(1.0, sums.tokens)).std()),
        "unseen": [int(expert) for expert in np.flatnonzero(sums.count_E == 0)],
    }


def _similarities(
    layer: Layer, sums: LayerStatistics, weights: Weights, *, all_experts: bool
) -> dict[str, Any]:
    if layer.experts is None:
        return {}
    return {
        "router_rows": summary(router_cosines(weights, layer.experts)),
        "router_logits": summary(sums.logit_cosine_EE),
        "weights": summary(weight_cosines(weights, layer.experts)),
        "outputs": summary(sums.output_cosine_mean_EE) if all_experts else None,
        "mergeability": mergeability(sums) if all_experts else None,
    }


def mergeability(sums: LayerStatistics) -> dict[str, Any]:
    """Var[r] E||f_i - f_j||^2 of pairs of experts that some token selects together, r = g_i / (g_i + g_j).

    Merging two experts fixes the mix of their outputs; where their router weights share a token in varying
    proportions and their outputs differ, no fixed mix can follow (arXiv:2510.13999). Small values merge well. The mean
    weighs pairs by the tokens that select both; among the best pairs are those that at least ``MET`` tokens select.
    """
    import numpy as np

    gram_EE = sums.output_gram_mean_EE
    square_E = np.diagonal(gram_EE)
    distance_EE = np.maximum(square_E[:, None] + square_E[None, :] - 2 * gram_EE, 0.0)
    value_EE = np.where(sums.pair_count_EE > 0, sums.ratio_variance_EE * distance_EE, np.nan)
    np.fill_diagonal(value_EE, np.nan)
    met_EE = np.where(np.isnan(value_EE), 0.0, sums.pair_count_EE)
    total = float(met_EE.sum())
    mean = float((np.nan_to_num(value_EE) * met_EE).sum() / total) if total else None
    known_EE = np.where(sums.pair_count_EE >= MET, value_EE, np.nan)
    return {"mean": mean, "best_pairs": pairs(known_EE, largest=False)}


def _routing(model: Model, statistics: Statistics, progress: Progress) -> dict[str, Any] | None:
    """SRP and SCH of every layer, and of the model, or None where calibration kept no trace."""
    import numpy as np

    if not statistics.has_trace:
        return None
    experts = model.experts
    rows: list[dict[str, Any]] = []
    totals: dict[int, list[NDArray[np.int64]]] = {window: [] for window in WINDOWS}
    progress.stage("routing", len(statistics.layers))
    for index in statistics.layers:
        traces = _sequences(statistics, index)
        srp: dict[str, Any] = {}
        for window in WINDOWS:
            histograms_SEF = np.stack([window_counts(t, experts, window) for t in traces])
            totals[window].append(histograms_SEF)
            if histograms_SEF.any():
                srp[str(window)] = best_prediction(histograms_SEF.sum(axis=0))._asdict()
        sampled = _spread(traces)
        capacities = {share: min(experts, share * model.rule.top_k) for share in CACHES}
        sch = {
            str(share): cache_hits(sampled, experts, capacity, LOOK_AHEAD)
            for share, capacity in capacities.items()
        }
        rows.append({"layer": index, "srp": srp, "sch": sch})
        progress.advance()
    whole: dict[str, Any] = {}
    for window, parts in totals.items():
        # All experts of all layers under one threshold.
        histograms_SEF = np.concatenate(parts, axis=1)
        if histograms_SEF.any():
            found = best_prediction(histograms_SEF.sum(axis=0))
            low, high = interval(histograms_SEF, stream(0, "inspect", "srp", window))
            whole[str(window)] = {**found._asdict(), "interval": [low, high]}
    mean = {str(share): _mean([row["sch"][str(share)] for row in rows]) for share in CACHES}
    return {"layers": rows, "srp": whole, "sch": mean, "look_ahead": LOOK_AHEAD}


def _sequences(statistics: Statistics, layer: int) -> list[Any]:
    ids_TK, lengths, _ = statistics.trace(layer)
    import numpy as np

    return np.split(ids_TK, np.cumsum(lengths)[:-1])


def _spread(traces: list[Any]) -> list[Any]:
    """Whole sequences, evenly spread, with at most ``CACHE_TOKENS`` tokens (and one sequence at least)."""
    total = sum(len(trace) for trace in traces)
    step = max(1, -(-total // CACHE_TOKENS))
    return traces[::step]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
