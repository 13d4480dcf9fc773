"""MoLAE: the experts of a group share one projection of their input.

For a group of experts with gate (or up) matrices W_1..W_K and M = [W_1; ...; W_K] = U S V^T,

    W_e = A_e B,   B = S_R^(1/2) V_R^T  shared,   A_e = U_e S_R^(1/2)  the expert's own block of rows

(MoLAE, arXiv:2503.23100, first called MoLE). Cutting M is the best shared projection there is. The paper first cuts
each expert to a rank of its own, which can only add to the error; ``--per-expert-rank`` does so.
Gate and up have projections of their own. Down is left whole as in the paper; ``--down`` shares
how experts write their output, W_e = B A_e, by the leading eigenvectors of sum W_e W_e^T.

No text is needed. With text (``--data`` or ``--calibration`` of `calibrate --linear-grams`), which the paper does
not use, errors are measured on the mixture's inputs and, for down, on each expert's hidden activations.
Groups are of consecutive experts. One rank for all layers removes the asked fraction of all numbers of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option
from ._expert_unit import grams, matrices, write_experts
from ._experts import (
    DAMPING_HELP,
    WHOLE,
    Entries,
    SharedOptions,
    Sizes,
    largest,
    numbers,
    plan_experts,
)
from ._options import check_damping

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...execute import Work

INFO = MethodInfo(
    summary="experts of a group share the projection of their input",
    paper="arXiv:2503.23100",
    inputs="one mixture",
    data="gram",
    tier="custom",
    optional=True,
)


@dataclass(frozen=True)
class Options(SharedOptions):
    """What the user chooses."""

    group: int = option(4, "consecutive experts that share a projection")
    down: bool = option(False, "share how experts write their output too")
    per_expert_rank: int = option(0, "cut every expert's matrix to this rank first; 0 does not")
    damping: float = option(1e-4, DAMPING_HELP)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """One rank for all experts.

    Raises:
        UsageError: an option out of range.
        InputError: no rank removes the asked fraction.
    """
    check_damping(options.damping)
    if options.per_expert_rank < 0:
        raise UsageError(f"--per-expert-rank {options.per_expert_rank} should be at least 0")

    def entries_of(model: Model, sizes: Sizes) -> Entries:
        if options.group < 1 or sizes.experts % options.group:
            raise UsageError(
                f"--group {options.group} should divide the {sizes.experts} experts of {model.folder}"
            )
        groups = sizes.experts // options.group

        def make(rank: int) -> Entries:
            first = {"form": "input", "rank": rank, "groups": groups}
            last = {"form": "output", "rank": rank, "groups": groups}
            return {"gate": first, "up": first, "down": last if options.down else WHOLE}

        top = min(options.group * sizes.width, sizes.hidden)
        rank = largest(make, top, sizes, options.ratio)
        if not rank:
            least = numbers(make(1), sizes) / sizes.numbers
            raise InputError(
                f"{model.folder}: no rank leaves {1 - options.ratio:.0%} of the experts' numbers; the least "
                f"possible is {least:.0%}",
                hint="use a smaller --ratio" + ("" if options.down else " or --down"),
            )
        return make(rank)

    return plan_experts(
        models,
        options,
        entries_of=entries_of,
        params={"per_expert_rank": options.per_expert_rank, "damping": options.damping},
        memory=lambda sizes: 32 * max(sizes.hidden, sizes.width) ** 2,
    )


def decide(model: Model, options: Options, statistics: Grams, seed: int) -> dict[str, Any]:
    """Nothing is decided but that every layer has its matrices; tells how many inputs they sum."""
    from ...calibration.gram_folder import layer_statistics

    return layer_statistics(statistics, model)


def transform(work: Work) -> dict[str, object]:
    """Factorise one layer's experts."""
    from ...linalg.lowrank import truncate
    from ...linalg.sharing import Grouped, share_input, share_output

    damping, first = work.params["damping"], work.params["per_expert_rank"]
    found: dict[str, Grouped] = {}
    for part, entry in work.params["entries"].items():
        if entry["form"] == "whole":
            continue
        weights = matrices(work, part)
        if first:
            weights = [truncate(weight, min(first, *weight.shape)).product() for weight in weights]
        seen = grams(work, part)
        rank, groups = entry["rank"], entry["groups"]
        if part == "down":
            found[part] = share_output(weights, rank, groups, seen, damping=damping)
        else:
            gram = None if seen is None else seen[0]
            found[part] = share_input(weights, rank, groups, gram, damping=damping)
    return write_experts(work, found)
