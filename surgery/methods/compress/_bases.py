"""What ``mobe`` and ``slbf`` share: sizes, and the fit of one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ._experts import Entries, Sizes, largest, matrices, numbers, write_experts

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


def check(options: Any) -> None:
    """Refuse what no fit can use.

    Raises:
        UsageError: an option out of range.
    """
    if options.steps < 0 or options.inner < 0:
        raise UsageError(
            f"--steps {options.steps} and --inner {options.inner} should be at least 0"
        )


def inner_width(options: Any, sizes: Sizes, parts: int) -> int:
    """R, for experts of which ``parts`` projections share what the ratio leaves.

    Raises:
        UsageError: wider than the experts.
    """
    top = min(sizes.width, sizes.hidden)
    if options.inner > top:
        raise UsageError(f"--inner {options.inner} should be at most {top}")
    if options.inner:
        return int(options.inner)
    room = (1 - options.ratio * 3 / parts) * sizes.hidden
    return max(1, min(top, int(PRIVATE_SHARE * room)))


def choose_entries(
    model: Model,
    sizes: Sizes,
    ratio: float,
    make: Callable[[int], Entries],
    top: int,
) -> Entries:
    """The entries of the largest size that fits.

    Raises:
        InputError: none fits.
    """
    size = largest(make, top, sizes, ratio)
    if not size:
        raise InputError(
            f"{model.folder}: no basis leaves {1 - ratio:.0%} of the experts' numbers, at least "
            f"{numbers(make(1), sizes) / sizes.numbers:.0%} are needed",
            hint="use a smaller --ratio or --inner",
        )
    return make(size)


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
        )
    start = {part: made.errors[0] for part, made in found.items()}
    return {**write_experts(work, found), "start": start}
