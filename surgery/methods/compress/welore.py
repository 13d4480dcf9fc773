"""WeLore: ranks from the spectra themselves, by one threshold for the whole model.

Every matrix's singular values are put on a scale of their own and one threshold cuts all of them (arXiv:2407.11239):

    z_j = (s_j - min s) / (max s - min s),    R = #{j : z_j >= k},    W' = best approximation of rank R.

Matrices whose values fall off fast lose many ranks, flat ones few. ``--normalise quantile`` takes the 5 % and 95 %
quantiles for min and max, because one outlier would move all other values; ``energy`` cuts the directions with
the smallest share of sum s^2.

As published, a matrix is replaced only if more than ``--least-cut`` of its values are cut; others stay whole. Ours
adds what the published script lacks: a matrix whose form would take as many numbers as it has stays whole too. The
threshold is not taken from a table but is the smallest one at which the asked fraction of numbers is really gone in
the chosen form, found among all models' values z. ``--least-cut`` is 0.5 in the paper and 0 in its script; here 0,
because the pivot form saves at every rank. No text is needed. Two passes read the weights: spectra, then factors.
Experts of a layer share a rank for each projection, because their factors are stored in one tensor; their spectrum is
the root mean square of theirs, value by value. ``--allocate`` takes another rule in place of the threshold, which makes
it ``svd``; ``--rank-plan`` takes given ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option
from ._allocate import RULE_HELP, RULES, thresholded
from ._lowrank import choose, write_lowrank
from ._ranked import (
    RankOptions,
    by_layer,
    decided_ranks,
    grouped,
    index_of,
    own_spectrum,
    plan_ranked,
    settle_at_ranks,
)

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="ranks by one threshold on all spectra, then the nearest matrices",
    paper="arXiv:2407.11239",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options(RankOptions):
    """What the user chooses."""

    align: int = option(1, "round ranks down to a multiple of this where a matrix is large enough")
    allocate: str = option("welore", RULE_HELP, choices=RULES)
    normalise: str = option(
        "minmax",
        "the scale on which singular values are compared between matrices",
        choices=("minmax", "energy", "quantile"),
    )
    least_cut: float = option(
        0.0, "fraction of its values that a matrix must lose to be replaced; others stay whole"
    )


def plan(
    models: Sequence[Model], options: Options, decisions: Mapping[str, Any] | None = None
) -> Draft:
    """Uniform ranks, which take about as much room as those that the run will decide on, or the decided ones.

    Raises:
        UsageError: an option out of range.
    """
    if not 0 <= options.least_cut < 1:
        raise UsageError(f"--least-cut {options.least_cut} should be at least 0 and below 1")
    return plan_ranked(models, options, {}, decisions)


def decide_from_weights(
    model: Model,
    options: Options,
    statistics: Statistics | None,
    weights: Weights,
    seed: int,
) -> dict[str, Any]:
    """The threshold and every matrix's rank; nothing where options give the ranks.

    Raises:
        InputError: no threshold removes the asked fraction.
    """
    from ...linalg.spectrum import places

    if options.allocate != "welore" or options.ratio is None:
        return decided_ranks(model, options, weights, own_spectrum) or {}
    groups, items = grouped(choose(model, options.targets), weights, own_spectrum)
    threshold, ranks = thresholded(
        items,
        {label: places(item.values_P, options.normalise) for label, item in items.items()},
        form=options.form,
        ratio=options.ratio,
        least_cut=options.least_cut,
        align=options.align,
        index=index_of(model, options),
    )
    if not ranks:
        raise InputError(
            f"{model.folder}: no threshold removes {options.ratio:.0%} of the targeted numbers in the "
            f"{options.form} form",
            hint="use a smaller --ratio or --least-cut",
        )
    decided = by_layer(groups, ranks)
    return {layer: {"threshold": threshold, **found} for layer, found in decided.items()}


settle = settle_at_ranks(plan)


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix."""
    from ...linalg.lowrank import truncate

    (region,) = work.unit.reads
    return write_lowrank(work, truncate(work.read(region), work.params["rank"]))
