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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option, required
from ._allocate import Item, thresholded
from ._lowrank import (
    FORM_HELP,
    FORMS,
    RATIO_HELP,
    TARGETS_HELP,
    choose,
    plan_lowrank,
    shape_of,
    write_lowrank,
)

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics
    from ...execute import Work
    from ...linalg.spectrum import Values
    from ...weights import Weights

INFO = MethodInfo(
    summary="ranks by one threshold on all spectra, then the nearest matrices",
    paper="arXiv:2407.11239",
    inputs="one dense model or mixture",
    data="none",
    tier="custom",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    ratio: float = required(RATIO_HELP)
    form: str = option("pivot", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)
    align: int = option(1, "round ranks down to a multiple of this where a matrix is large enough")
    normalise: str = option(
        "minmax",
        "the scale on which singular values are compared between matrices",
        choices=("minmax", "energy", "quantile"),
    )
    least_cut: float = option(
        0.0, "fraction of its values that a matrix must lose to be replaced; others stay whole"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Uniform ranks, which take about as much room as those that the run will decide on.

    Raises:
        UsageError: an option out of range.
    """
    if not 0 <= options.least_cut < 1:
        raise UsageError(f"--least-cut {options.least_cut} should be at least 0 and below 1")
    return _draft(models, options, None)


def decide_from_weights(
    model: Model,
    options: Options,
    statistics: Statistics | None,
    weights: Weights,
    seed: int,
) -> dict[str, Any]:
    """The threshold and every matrix's rank.

    Raises:
        InputError: no threshold removes the asked fraction.
    """
    from ...linalg.lowrank import singular_values
    from ...linalg.spectrum import places

    chosen = choose(model, options.targets)
    found: dict[str, Values] = {}
    items: dict[str, Item] = {}
    for linear in weights.track(chosen):
        values_P = singular_values(weights.read(linear.region)).numpy()
        found[linear.label] = places(values_P, options.normalise)
        items[linear.label] = Item(shape_of(linear.region), 1, values_P)
    threshold, ranks = thresholded(
        items,
        found,
        form=options.form,
        ratio=options.ratio,
        least_cut=options.least_cut,
        align=options.align,
    )
    if not ranks:
        raise InputError(
            f"{model.folder}: no threshold removes {options.ratio:.0%} of the targeted numbers in the "
            f"{options.form} form",
            hint="use a smaller --ratio or --least-cut",
        )
    decided: dict[str, Any] = {}
    for linear in chosen:
        layer = decided.setdefault(str(linear.layer), {"threshold": threshold, "ranks": {}})
        if linear.label in ranks:
            layer["ranks"][linear.label] = ranks[linear.label]
    return decided


def settle(models: Sequence[Model], options: Options, decisions: dict[str, Any]) -> Draft | None:
    """The output with the decided ranks."""
    ranks: dict[str, int] = {}
    for layer in decisions.values():
        ranks.update(layer["ranks"])
    return _draft(models, options, ranks)


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix."""
    from ...linalg.lowrank import truncate

    (region,) = work.unit.reads
    return write_lowrank(work, truncate(work.read(region), work.params["rank"]))


def _draft(models: Sequence[Model], options: Options, ranks: Mapping[str, int] | None) -> Draft:
    return plan_lowrank(
        models,
        form=options.form,
        ratio=options.ratio,
        targets=options.targets,
        align=options.align,
        params={},
        chosen_ranks=ranks,
    )
