"""Virtual groups: the feed-forward split in G shards, M copies of each, and routers that pick whole groups.

"Upcycling Large Language Models into Mixture of Experts" (NVIDIA, arXiv:2410.07524): E = M * G experts of width I / G.
Expert e = i * G + j holds shard j, the neurons [j * I / G, (j + 1) * I / G). The router has M random rows, each
repeated G times, so the G experts of a group have one logit. With k a multiple of G, top-k selects whole groups, and
normalised weights add up to 1 / G over the copies of each shard:

    MoE(x) = sum_j F_j(x) / G = F(x) / G

``--scale exact`` (default) multiplies down by G, which restores F for every x and router, and rounds nothing where G
is a power of two. ``--scale nvidia`` is the paper's: all three matrices by A^(1/3), with A = M G^2 / k where the router
takes softmax before top-k without normalising (``--no-normalise``, possible in the Qwen families) and A = G where
weights sum to one. It only approximates F on SwiGLU, because silu(a g) is not a silu(g). ``--scale none`` leaves the
weights alone.

``--preset dynamic-dino`` takes one group per token, G = k, the decomposition of Dynamic-DINO.

What breaks the identity is refused: k, E or I that G does not divide, and rows that coincide between groups, whose tied
logits would let top-k mix shards of two groups. Run in bfloat16, the logits of two groups can still round to one value
for a single token, which then may get a mixture of shards.

``--router-init`` makes a row for each group otherwise: from texts, one for each of the M groups.

Deviation: rows are drawn for M groups, where the authors draw E rows and keep the first M; the distribution is the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common
from . import _routers as routers

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="split every feed-forward in shards, copy them, and tie router rows into groups",
    paper="arXiv:2410.07524",
    inputs="one dense model",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.RoutedOptions):
    """What the user chooses."""

    granularity: int | None = option(None, "shards G of the feed-forward; a preset may fix it")
    scale: str = option(
        "exact", "how the weights make up for the shards", choices=("exact", "nvidia", "none")
    )
    normalise: bool = option(True, "selected weights sum to one; without, outputs shrink")
    preset: str | None = option(
        None, "dynamic-dino sets the granularity to --top-k", choices=("dynamic-dino",)
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with grouped shards in every layer.

    Raises:
        InputError: counts that do not divide, or a parent that fits no target.
        UsageError: no granularity, or options that contradict each other.
    """
    model = common.one_dense(models, "upcycling with virtual groups")
    common.check_counts(options.experts, options.top_k, options.router_std)
    shards = _granularity(options)
    routers.check(options, options.experts, options.top_k, repeat=shards)
    neurons = model.config.integer("intermediate_size")
    for name, value in (
        ("--experts", options.experts),
        ("--top-k", options.top_k),
        ("the feed-forward's width", neurons),
    ):
        if value % shards:
            raise InputError(
                f"{name} {value} is not a multiple of --granularity {shards}",
                hint="whole groups of shards are selected; anything else is not the dense function",
            )

    def grown(changes: Mapping[str, object]) -> common.Mixture:
        return common.grow(
            model,
            experts=options.experts,
            top_k=options.top_k,
            target=options.target,
            width=neurons // shards,
            changes=changes,
        )

    mixture = grown({})
    if not options.normalise:
        if "norm_topk_prob" not in mixture.raw:
            raise InputError(
                f"{mixture.family.model_type} always normalises the selected weights",
                hint="--no-normalise is for the Qwen families",
            )
        mixture = grown({"norm_topk_prob": False})
    factors = _factors(mixture, options, shards)

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units = [
            routers.unit(layer, experts, options, repeat=shards),
            *common.neutral_units(mixture, layer),
        ]
        moves: common.Moves = []
        for projection in PROJECTIONS:
            if projection != "down" and factors[projection] == 1:
                moves.extend(_moves(layer, experts, projection, shards))
            else:
                units.append(_unit(layer, experts, projection, shards, factors[projection]))
        return units, moves

    draft = common.draft(mixture, fill, _exactness(mixture, options, shards))
    return routers.asking(draft, options, options.experts // shards)


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Draw grouped router rows, fill a neutral shared expert, or scale and deal out shards of a matrix."""
    done = common.fill_common(work)
    if done is not None:
        return done
    matrix = work.read(work.unit.reads[0])
    matrix *= work.params["factor"]
    axis = 1 if work.params["projection"] == "down" else 0
    pieces = matrix.chunk(work.params["shards"], dim=axis)
    for expert, region in enumerate(work.unit.writes):
        work.write(region, pieces[expert % len(pieces)])
    return {}


def nvidia_factor(copies: int, shards: int, top_k: int, *, normalised: bool) -> float:
    """The paper's factor on each of the three matrices, M copies of G shards and k experts per token."""
    return float((shards if normalised else copies * shards**2 / top_k) ** (1 / 3))


def _granularity(options: Options) -> int:
    if options.preset is not None:
        if options.granularity not in (None, options.top_k):
            raise UsageError(
                f"--preset {options.preset} sets the granularity to --top-k {options.top_k}, "
                f"--granularity says {options.granularity}"
            )
        return options.top_k
    if options.granularity is None:
        raise UsageError("--granularity is needed", hint="or --preset dynamic-dino")
    if options.granularity < 1:
        raise UsageError(f"--granularity should be at least 1, is {options.granularity}")
    return options.granularity


def _factors(mixture: common.Mixture, options: Options, shards: int) -> dict[str, float]:
    if options.scale == "nvidia":
        factor = nvidia_factor(
            options.experts // shards,
            shards,
            options.top_k,
            normalised=mixture.rule.weights_sum_to_one,
        )
        return dict.fromkeys(PROJECTIONS, factor)
    return {"gate": 1.0, "up": 1.0, "down": float(shards) if options.scale == "exact" else 1.0}


def _exactness(mixture: common.Mixture, options: Options, shards: int) -> Exactness:
    if not mixture.rule.weights_sum_to_one:
        return Exactness("approximate", "the selected weights are not normalised")
    if shards == 1:
        return common.identical_experts(mixture)
    types = {mixture.model.dtype(layer.ffn["down"].tensor) for layer in mixture.model.layers}
    if options.scale == "exact" and shards & (shards - 1) and not types <= {"F32", "F64"}:
        rounded = ", ".join(sorted(types))
        return Exactness("approximate", f"{shards} times the down projection rounds in {rounded}")
    if options.scale == "exact":
        return Exactness(
            "exact",
            f"top-k selects whole groups, whose weights sum to 1/{shards} per shard, and down is scaled "
            f"by {shards}",
        )
    reason = {
        "nvidia": "silu is not homogeneous, so the cube root on all three matrices does not restore the output",
        "none": f"outputs shrink to 1/{shards}",
    }
    return Exactness("approximate", reason[options.scale])


def _moves(layer: Layer, experts: Experts, projection: str, shards: int) -> common.Moves:
    width = experts.width
    return [
        (
            layer.ffn[projection].rows(shard * width, (shard + 1) * width),
            [experts.region(expert, projection) for expert in range(shard, experts.count, shards)],
        )
        for shard in range(shards)
    ]


def _unit(layer: Layer, experts: Experts, projection: str, shards: int, factor: float) -> Unit:
    return Unit(
        f"layer.{layer.index}.{projection}",
        "transform",
        layer.index,
        reads=(layer.ffn[projection],),
        writes=tuple(experts.region(expert, projection) for expert in range(experts.count)),
        params={"part": "shards", "projection": projection, "shards": shards, "factor": factor},
        memory=4 * experts.hidden * experts.width * (2 * shards + 6),
    )
