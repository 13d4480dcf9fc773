"""HOPE: drop the set of experts whose joint activations are smallest, pairs included.

HOPE (arXiv:2609.18916). With a_i = g_i ||f_i|| the activation of expert i on a token that selects it (g the
coefficient that really multiplies its output f), and p the 0/1 vector of the experts to drop:

    F_ij = mean of a_i a_j over the tokens that select both i and j, 0 where none does
    minimise p^T F p  subject to  sum of p = the number to drop

That mean is the paper's: a pair that is selected together once weighs as much as one that always is, and pairs that
never are weigh nothing. With few experts a token it can therefore drop whole groups of experts that never meet.
``--mean all`` divides by the number of all tokens instead; p^T F p is then the mean square of the summed
activations of the dropped experts. On the small mixture of this project (2 of 16 experts a token) it loses far
less; try both.

The diagonal, F_ii = E[a_i^2], alone would drop the least active experts one by one; the rest keeps it from
dropping experts that stand in for each other on the same tokens.

Where there are at most a million sets, all are tried, and of those equal up to rounding the first in
lexicographic order is taken. Otherwise the problem is relaxed to 0 <= p <= 1 and the largest p are rounded up;
from there, and from the set the diagonal alone chooses, single exchanges are made as long as one lowers the
objective, and the better end wins. The result is then never worse than the diagonal's, and need not be the best:
the report says ``exact`` true or false. F is not positive semi-definite in general. The paper relaxes by
sequential quadratic programming; here it is Frank-Wolfe with exact line search, which keeps to the constraints.
The number to drop is the same in every layer; the paper's extension across layers is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..base import Draft, MethodInfo, option
from ..experts._reconstruct import ReconstructOptions
from ._keep import candidates, count_subsets, groups_of, subsets
from ._prune import plan_prune, transform_prune
from ._saliency import PROTECT, PROTECT_HELP, UNSEEN, constraints

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...architectures.model import Model
    from ...calibration.statistics import LayerStatistics, Statistics

    Floats = NDArray[np.float64]
    Choices = Sequence[tuple[list[int], int]]

INFO = MethodInfo(
    summary="drop the set of experts with the least joint activation, pairs included",
    paper="arXiv:2609.18916",
    inputs="one mixture of experts",
    data="routed",
)
EXHAUSTIVE = 1_000_000
"""Most sets that are all tried."""

STEPS = 1000
ROUNDING = 1e-12
"""Objectives closer than this share of the sum of F count as equal."""


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    mean: str = option(
        "shared",
        "what activations of a pair are averaged over: tokens that select both (the paper's), or all tokens",
        choices=("shared", "all"),
    )
    protect: str = option("none", PROTECT_HELP, choices=PROTECT)
    unseen: str = option(
        "prune",
        "experts that no calibration token selects: prune them (they cost nothing), keep them, or stop "
        "with an error",
        choices=UNSEEN,
    )


@dataclass(frozen=True)
class Solution:
    """Which experts go.

    Attributes:
        dropped: ascending.
        objective: p^T F p.
        exact: whether no other set has a smaller one.
    """

    dropped: tuple[int, ...]
    objective: float
    exact: bool


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` of the experts of every layer."""
    return plan_prune(models, options.experts, options)


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """The set with the smallest objective in every layer. Uses no randomness."""
    decided = {}
    limits = constraints(model, statistics, options.protect, options.unseen)
    for index, limit in limits.items():
        matrix_EE = interaction(statistics.layer(index), shared=options.mean == "shared")
        choices = candidates(
            model.experts,
            options.experts,
            groups=groups_of(model).count,
            forced=limit.forced,
            where=f"layer {index}",
        )
        found = solve(matrix_EE, choices)
        kept = [expert for expert in range(model.experts) if expert not in found.dropped]
        decided[str(index)] = {
            "kept": kept,
            "scores": [float(value) for value in matrix_EE.diagonal()],
            "objective": found.objective,
            "diagonal_objective": objective(matrix_EE, diagonal_choice(matrix_EE, choices)),
            "exact": found.exact,
            **limit.to_json(),
        }
    return decided


transform = transform_prune


def interaction(layer: LayerStatistics, *, shared: bool = True) -> Floats:
    """F of a layer, averaged over tokens that select both experts, or over all tokens."""
    import numpy as np

    if not shared:
        mean_EE: Floats = (layer.pair_activation_EE + layer.pair_activation_EE.T) / 2
        return mean_EE / layer.tokens
    pairs_EE = layer.pair_count_EE
    found: Floats = np.divide(
        layer.pair_activation_EE,
        pairs_EE,
        out=np.zeros_like(layer.pair_activation_EE),
        where=pairs_EE > 0,
    )
    return (found + found.T) / 2


def objective(matrix_EE: Floats, dropped: Sequence[int]) -> float:
    """p^T F p."""
    chosen = list(dropped)
    return float(matrix_EE[chosen][:, chosen].sum())


def diagonal_choice(matrix_EE: Floats, choices: Choices) -> tuple[int, ...]:
    """What the diagonal alone would drop."""
    return _smallest([float(value) for value in matrix_EE.diagonal()], choices)


def solve(matrix_EE: Floats, choices: Choices, *, limit: int = EXHAUSTIVE) -> Solution:
    """The set to drop.

    Args:
        matrix_EE: F, symmetric.
        choices: from :func:`candidates`.
        limit: most sets that are all tried.
    """
    import numpy as np

    if not np.isfinite(matrix_EE).all():
        raise InputError("the activations of the statistics are not finite")
    exact = count_subsets(choices) <= limit
    if exact:
        dropped = _exhaustive(matrix_EE, choices)
    else:
        starts = [_relaxed(matrix_EE, choices), diagonal_choice(matrix_EE, choices)]
        ends = [_exchange(matrix_EE, start, choices) for start in starts]
        dropped = min(ends, key=lambda end: (objective(matrix_EE, end), end))
    return Solution(dropped, objective(matrix_EE, dropped), exact)


def _smallest(values: Sequence[float], choices: Choices) -> tuple[int, ...]:
    """In each group the candidates with the smallest values, as one ascending tuple."""
    found: list[int] = []
    for free, drop in choices:
        found.extend(sorted(free, key=lambda expert: (values[expert], expert))[:drop])
    return tuple(sorted(found))


def _exhaustive(matrix_EE: Floats, choices: Choices) -> tuple[int, ...]:
    """The best of all sets; of equal ones the first."""
    import numpy as np

    drop = sum(number for _, number in choices)
    if drop == 0:
        return ()
    slack = ROUNDING * float(matrix_EE.sum())
    best, found = float("inf"), tuple[int, ...]()
    size = max(1, 1_000_000 // drop**2)
    every = subsets(choices)
    while block := list(islice(every, size)):
        sets = np.asarray(block)
        values = matrix_EE[sets[:, :, None], sets[:, None, :]].sum(axis=(1, 2))
        lowest = float(values.min())
        if lowest < best - slack:
            found = block[int(np.flatnonzero(values <= lowest + slack)[0])]
            best = float(values[block.index(found)])
    return found


def _relaxed(matrix_EE: Floats, choices: Choices) -> tuple[int, ...]:
    """Frank-Wolfe on the relaxed problem from the uniform point, rounded."""
    import numpy as np

    p_E = np.zeros(len(matrix_EE))
    for free, drop in choices:
        p_E[free] = drop / max(1, len(free))
    for _ in range(STEPS):
        gradient_E = matrix_EE @ p_E
        direction_E = -p_E
        direction_E[list(_smallest([float(x) for x in gradient_E], choices))] += 1.0
        slope = float(gradient_E @ direction_E)
        if slope >= -ROUNDING * float(matrix_EE.sum()):
            break
        curvature = float(direction_E @ matrix_EE @ direction_E)
        p_E += direction_E * (min(1.0, -slope / curvature) if curvature > 0 else 1.0)
    return _smallest([-float(x) for x in p_E], choices)


def _exchange(matrix_EE: Floats, start: tuple[int, ...], choices: Choices) -> tuple[int, ...]:
    """Exchange one dropped expert for a kept one of its group while the best exchange helps."""
    import numpy as np

    dropped = set(start)
    slack = ROUNDING * float(matrix_EE.sum())
    while True:
        reach_E = matrix_EE[:, sorted(dropped)].sum(axis=1)
        diagonal_E = matrix_EE.diagonal()
        best: tuple[float, int, int] = (-slack, -1, -1)
        for free, _ in choices:
            out = [expert for expert in free if expert in dropped]
            into = [expert for expert in free if expert not in dropped]
            if not out or not into:
                continue
            change = (diagonal_E[out] - 2 * reach_E[out])[:, None]
            change = change + (diagonal_E[into] + 2 * reach_E[into])[None, :]
            change = change - 2 * matrix_EE[np.ix_(out, into)]
            row, column = np.unravel_index(int(change.argmin()), change.shape)
            best = min(best, (float(change[row, column]), out[row], into[column]))
        if best[1] < 0:
            return tuple(sorted(dropped))
        dropped = (dropped - {best[1]}) | {best[2]}
