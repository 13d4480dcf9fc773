"""What the options of every method that leaves layers with fewer experts have in common.

Layers can keep different numbers of experts, as ``--schedule`` says or as ``--budget global`` finds best, and can be
operated on one after the other (``--sequential``). Methods know nothing of either: they decide and plan for one number
in all layers, and `surgery/deciding.py` asks them for one layer at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ..errors import UsageError
from ..schedules import GRAMMAR, parse
from .base import option, required

if TYPE_CHECKING:
    from ..architectures.model import Model

SCHEDULE_HELP = f"experts to keep by layer, of which --experts is the most: {GRAMMAR}"
BUDGET_HELP = (
    "uniform: --experts in every layer; global: as many in all, given to the layers so that the summed squared errors "
    "relative to the hidden states, measured on the sampled inputs for every number, are smallest"
)
STEP_HELP = "numbers of experts that --budget global tries lie so far apart (default: a sixteenth of the experts)"
SAMPLE_HELP = "rows of each mixture's input to sample, where the method uses any"
SEQUENTIAL_HELP = (
    "go from layer to layer: each one's statistics and sampled inputs are taken behind the layers that were already "
    "operated on, and --reconstruct solves for the original model's output on the same tokens"
)


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options of every method that leaves layers with fewer experts."""

    experts: int = required("experts to keep in every layer")
    schedule: str | None = option(None, SCHEDULE_HELP, metavar="SCHEDULE")
    budget: str = option("uniform", BUDGET_HELP, choices=("uniform", "global"))
    budget_step: int | None = option(None, STEP_HELP, metavar="N")
    sequential: bool = option(False, SEQUENTIAL_HELP)
    sample: int = option(4096, SAMPLE_HELP)

    def uniform(self, experts: int) -> Self:
        """The same with one number of experts in all layers, as the output of stock classes and with all statistics
        from the original model: how one layer is decided and tried.
        """
        changes: dict[str, Any] = {
            "experts": experts,
            "schedule": None,
            "budget": "uniform",
            "budget_step": None,
            "sequential": False,
        }
        if getattr(self, "router", None) == "mapped":
            changes["router"] = "tied"  # the same function
        return dataclasses.replace(self, **changes)

    def counted(self, counts: Mapping[int, int]) -> Self:
        """The same with these numbers of experts by layer."""
        return dataclasses.replace(
            self,
            experts=max(counts.values()),
            schedule=",".join(str(counts[index]) for index in sorted(counts)),
            budget="uniform",
            budget_step=None,
        )


def layer_counts(model: Model, options: LayerOptions) -> dict[int, int] | None:
    """How many experts each layer keeps, or None for ``options.experts`` in all of them.

    Raises:
        UsageError: a schedule that cannot be read or whose largest number is another, or options that exclude each
            other.
    """
    check_layered(options)
    if options.schedule is None:
        return None
    layers = [layer.index for layer in model.moe_layers]
    numbers = parse(options.schedule, len(layers), "--schedule")
    if max(numbers) != options.experts:
        raise UsageError(
            f"--schedule {options.schedule}: keeps {max(numbers)} experts at most, --experts says "
            f"{options.experts}",
            hint="--experts is the largest number of the schedule",
        )
    return None if len(set(numbers)) == 1 else dict(zip(layers, numbers, strict=True))


def check_layered(options: LayerOptions) -> None:
    """Refuse options that exclude each other.

    Raises:
        UsageError: naming the two.
    """
    chosen = "--budget global" if options.budget == "global" else ""
    if chosen and options.schedule is not None:
        raise UsageError(
            f"--schedule and {chosen} exclude each other: both give layers their numbers"
        )
    if chosen and options.sequential:
        raise UsageError(
            f"--sequential and {chosen} exclude each other: numbers are found on the original model's inputs",
            hint="take the numbers that --budget global reports for --schedule, and add --sequential to that",
        )
    if options.sample < 1:
        raise UsageError(f"--sample should be at least 1, is {options.sample}")
    if options.budget_step is not None and not chosen:
        raise UsageError("--budget-step belongs to --budget global")
    if options.budget_step is not None and options.budget_step < 1:
        raise UsageError(f"--budget-step should be at least 1, is {options.budget_step}")
    several = chosen or ("--schedule" if options.schedule is not None else "")
    if several and getattr(options, "allocation", "uniform") == "global":
        raise UsageError(
            f"{several} and --allocation global exclude each other: both give layers their numbers"
        )
    if options.sequential and getattr(options, "allocation", "uniform") == "global":
        raise UsageError(
            "--sequential and --allocation global exclude each other: the latter looks at all layers"
        )
    if options.sequential and getattr(options, "protect", "none") == "super":
        raise UsageError(
            "--sequential and --protect super exclude each other: the latter looks at all layers"
        )
