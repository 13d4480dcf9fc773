"""What ``mobe`` and ``slbf`` share: options, sizes, and the fit of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ..base import Draft, option
from ._expert_unit import matrices, write_experts
from ._experts import (
    WHOLE,
    Entries,
    SharedOptions,
    Sizes,
    largest,
    numbers,
    plan_experts,
)

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

ACTIVATIONS = ("silu", "tanh")
ACTIVATION_HELP = "the function between mixed bases and private factors"
INNER_HELP = (
    "width R of the private factors; 0: as much as leaves two fifths of the room to the bases"
)
STEPS_HELP = "steps of the fit; the published ones take 10,000 to 30,000, on a GPU"
PRIVATE_SHARE = 0.6


@dataclass(frozen=True)
class BasesOptions(SharedOptions):
    """What the user chooses of either method."""

    inner: int = option(0, INNER_HELP)
    activation: str = option("silu", ACTIVATION_HELP, choices=ACTIVATIONS)
    steps: int = option(100, STEPS_HELP)


def plan_bases(
    models: Sequence[Model],
    options: BasesOptions,
    parts: Sequence[str],
    bases: Callable[[Sizes, int], Mapping[str, int]],
    top: Callable[[Sizes, int], int],
) -> Draft:
    """The largest bases that the ratio allows in every layer, for some of the projections.

    Args:
        parts: the projections; down by its transpose.
        bases: from the mixture's sizes and the size that is looked for to ``bases`` and ``rank`` of an entry.
        top: the largest size, from the mixture's and R.

    Raises:
        UsageError: an option out of range.
        InputError: no size removes the asked fraction.
    """
    if options.steps < 0 or options.inner < 0:
        raise UsageError(
            f"--steps {options.steps} and --inner {options.inner} should be at least 0"
        )

    def entries_of(model: Model, sizes: Sizes) -> Entries:
        inner = _inner_width(options, sizes, len(parts))

        def make(size: int) -> Entries:
            made = {
                part: {
                    "form": "bases",
                    "inner": inner,
                    **bases(sizes, size),
                    "activation": options.activation,
                    "transposed": part == "down",
                }
                for part in parts
            }
            return {part: made.get(part, WHOLE) for part in PROJECTIONS}

        size = largest(make, top(sizes, inner), sizes, options.ratio)
        if not size:
            raise InputError(
                f"{model.folder}: no basis leaves {1 - options.ratio:.0%} of the experts' numbers, at least "
                f"{numbers(make(1), sizes) / sizes.numbers:.0%} are needed",
                hint="use a smaller --ratio or --inner",
            )
        return make(size)

    return plan_experts(
        models,
        options,
        entries_of=entries_of,
        params={"steps": options.steps},
        memory=lambda sizes: 8 * sizes.numbers,
        steps=options.steps,
    )


def _inner_width(options: BasesOptions, sizes: Sizes, parts: int) -> int:
    """R, for experts of which ``parts`` projections share what the ratio leaves.

    Raises:
        UsageError: wider than the experts.
    """
    top = min(sizes.width, sizes.hidden)
    if options.inner > top:
        raise UsageError(f"--inner {options.inner} should be at most {top}")
    if options.inner:
        return options.inner
    room = (1 - options.ratio * 3 / parts) * sizes.hidden
    return max(1, min(top, int(PRIVATE_SHARE * room)))


def fit(work: Work) -> dict[str, object]:
    """Fit and write one layer's experts; reports the relative error at the start of the fit too."""
    from ...linalg.bases import Mixed, fit_bases

    found: dict[str, Mixed] = {}
    for part, entry in work.params["entries"].items():
        if entry["form"] == "whole":
            continue
        found[part] = fit_bases(
            matrices(work, part),
            entry["inner"],
            entry["bases"],
            work.params["steps"],
            work.rng("bases", work.unit.id, part),
            rank=entry.get("rank", 0),
            activation=entry["activation"],
            transposed=entry["transposed"],
            stepped=work.step,
        )
    start = {part: made.errors[0] for part, made in found.items()}
    return {**write_experts(work, found), "start": start}
