"""How much scores of experts depend on which half of the text they are taken on."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import methods

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..calibration.statistics import LayerStatistics, Statistics

    Scores = NDArray[np.float64]


def scores() -> dict[str, Callable[[LayerStatistics], Scores]]:
    """The score of every pruning method that has one of sums over tokens, by the method's name."""
    found = {}
    for name in methods.names("prune"):
        module = importlib.import_module(f"..methods.prune.{name.replace('-', '_')}", __package__)
        score = getattr(module, "score", None)
        if score is not None and list(inspect.signature(score).parameters) == ["layer"]:
            found[name] = score
    return found


def rank_correlation(first: Scores, second: Scores) -> float | None:
    """Spearman's correlation, tied values at their mean rank; None where one side is constant."""
    import numpy as np
    from scipy.stats import rankdata

    ranks = [rankdata(values) for values in (first, second)]
    spread = [float(np.std(values)) for values in ranks]
    if 0.0 in spread:
        return None
    centred = [values - values.mean() for values in ranks]
    return float((centred[0] * centred[1]).mean() / (spread[0] * spread[1]))


def overlap(first: Scores, second: Scores, count: int) -> float:
    """Jaccard index of the ``count`` lowest of both; ties go to the lower index."""
    lowest = [
        set(sorted(range(len(values)), key=lambda i: (values[i], i))[:count])
        for values in (first, second)
    ]
    return len(lowest[0] & lowest[1]) / len(lowest[0] | lowest[1]) if count else 1.0


def stability(statistics: Statistics, dropped: int) -> dict[str, Any]:
    """Each pruning score on both halves of the text, and on each domain alone against all of it.

    Args:
        dropped: experts per layer whose choice is compared, for the Jaccard index.

    Returns:
        By method: ``spearman`` and ``jaccard`` between the halves, means over layers and the worst layer, and the
        same for every domain against the whole text.
    """
    found: dict[str, Any] = {}
    known = scores()
    halves = statistics.has_halves
    for name, score in known.items():
        row: dict[str, Any] = {"halves": None, "domains": {}}
        if halves:
            pairs = []
            for index in statistics.layers:
                first, second = statistics.half(index, 0), statistics.half(index, 1)
                if first.tokens and second.tokens:
                    pairs.append((score(first), score(second)))
            row["halves"] = _summary(pairs, dropped)
        if len(statistics.domains) > 1:
            for domain in statistics.domains:
                against = [
                    (
                        score(statistics.layer(index, [domain])),
                        score(statistics.layer(index)),
                    )
                    for index in statistics.layers
                ]
                row["domains"][domain] = _summary(against, dropped)
        found[name] = row
    return {"dropped": dropped, "scores": found}


def _summary(pairs: list[tuple[Scores, Scores]], dropped: int) -> dict[str, float | None] | None:
    if not pairs:
        return None
    correlations = [rank_correlation(first, second) for first, second in pairs]
    known = [value for value in correlations if value is not None]
    overlaps = [overlap(first, second, dropped) for first, second in pairs]
    return {
        "spearman": sum(known) / len(known) if known else None,
        "spearman_worst": min(known) if known else None,
        "jaccard": sum(overlaps) / len(overlaps),
        "jaccard_worst": min(overlaps),
    }
