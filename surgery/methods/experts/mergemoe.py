"""MergeMoE: average gate and up, and fit the down projection to what the group's experts gave together.

MergeMoE (arXiv:2510.14436):

1. Centres: the N most used experts of every layer, ties to the lower index. The others join the centre with the
   largest cosine of [G; U], flattened as they lie (``--align weight``: after their neurons are matched to the
   centre's, which then also comes before averaging; not in the paper).
2. G' = sum of B_j G_j and U' = sum of B_j U_j with B_j a member's share of the group's activation counts; uniform
   where no token used the group.
3. With P = act(G' X) * U' X on sampled inputs X and Q the members' hidden activations stacked, the paper sets
   D' = [B_1 D_1 ... B_m D_m] Q P⁺. Since the first two factors give Y = sum of B_j f_j(X), this is D' = Y P⁺: the
   least squares fit of the merged expert to the members' weighted outputs, from F x F normal equations.

Deviations: the fit is a ridge on the change from the averaged down projection (``--merge-ridge``, in units of the
mean diagonal), because the plain one fails with fewer inputs than neurons; so its error on X is never larger than
the average's, and identical experts come back as they were. ``--merge-ridge 0`` is the paper's and refuses a singular
system. X are the sampled inputs that the router sends to any member, all of them if there are none; the paper does
not say. A group of one is copied. The paper sums the gates of a group: ``--router tied``; the default, ``keep``,
writes the centres' rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.reader import TensorReader
from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option
from ._groups import Grouping, from_members
from ._merge import ROUTER_HELP, ROUTERS, plan_merge
from ._merge_unit import transform_merge
from ._reconstruct import ReconstructOptions, reconstruct_params

if TYPE_CHECKING:
    from ...architectures.model import Experts, Model
    from ...calibration.statistics import Statistics

INFO = MethodInfo(
    summary="average gate and up around the most used experts, fit the down projection to their outputs",
    paper="arXiv:2510.14436",
    inputs="one mixture of experts",
    data="routed",
)


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    router: str = option("keep", ROUTER_HELP, choices=ROUTERS)
    align: str = option(
        "none",
        "match neurons to the centre's before experts are compared and averaged",
        choices=("none", "weight"),
    )
    merge_ridge: float = option(
        0.01, "pull of the fit towards the averaged down projection, in units of the mean diagonal"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer."""
    if not options.merge_ridge >= 0:
        raise UsageError(f"--merge-ridge should not be negative, is {options.merge_ridge:g}")
    params = {
        "router": options.router,
        "align": options.align,
        "reference": "representative",
        "combine": "least-squares",
        "combine_ridge": options.merge_ridge,
    }
    return plan_merge(
        models,
        options,
        router=options.router,
        params={**params, **reconstruct_params(options)},
        sample=options.sample,
    )


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Groups of every layer, from usage counts and weights. Uses no randomness."""
    decided = {}
    with TensorReader(model.checkpoint) as reader:
        for layer in model.moe_layers:
            usage = [float(count) for count in statistics.layer(layer.index).count_E]
            if layer.experts is None or not sum(usage):
                raise InputError(
                    f"layer {layer.index}: the statistics saw no token; calibrate on some text"
                )
            grouping = _group(reader, layer.experts, usage, options)
            decided[str(layer.index)] = grouping.to_json()
    return decided


transform = transform_merge


def _group(
    reader: TensorReader, experts: Experts, usage: list[float], options: Options
) -> Grouping:
    from ._weights import aligned_cosine, cosine, weight_gram

    ranked = sorted(range(len(usage)), key=lambda expert: (-usage[expert], expert))
    centres, others = sorted(ranked[: options.experts]), sorted(ranked[options.experts :])
    if options.align == "weight":
        likeness = aligned_cosine(reader, experts, centres, others)
    else:
        cosine_EE = cosine(weight_gram(reader, experts, ("gate", "up")))
        likeness = {(e, c): float(cosine_EE[e, c]) for e in others for c in centres}
    members = {centre: [centre] for centre in centres}
    similarity = {}
    for expert in others:
        best = max(centres, key=lambda centre: (likeness[expert, centre], -centre))
        members[best].append(expert)
        similarity[str(expert)] = likeness[expert, best]
    themselves = {centre: centre for centre in centres}
    return from_members(members, themselves, usage, {"similarity": similarity})
