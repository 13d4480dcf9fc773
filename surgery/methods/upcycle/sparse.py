"""Sparse upcycling: every feed-forward becomes E copies of itself behind a new router.

Sparse Upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055). All other weights are copied byte for byte. The
router is drawn from N(0, std^2), std 0.02 by default: a row of unit variance would make routing nearly one-hot,
since normalised inputs have length sqrt(D). ``--router-init`` starts it otherwise, also from a text for each expert.

The copies are identical, so the mixture is the sum of the selected weights times the dense feed-forward: it
equals the dense model exactly where the target's router normalises those weights to one, for any router and any
top-k. ``--noise`` breaks the symmetry by adding N(0, noise^2) to a random ``--noise-fraction`` of each expert's
neurons (gate and up rows, down columns), and then nothing is promised.

A target that requires a shared expert gets a narrow one whose down projection is zero: it contributes nothing,
and its first rows copy the dense feed-forward so that training can still wake it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...errors import UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common
from . import _routers as routers

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="copy every feed-forward E times behind a new router",
    paper="arXiv:2212.05055",
    inputs="one dense model",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.RoutedOptions):
    """What the user chooses."""

    noise: float = option(0.0, "standard deviation of noise added to the experts")
    noise_fraction: float = option(1.0, "fraction of each expert's neurons that get noise")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with a mixture in every layer.

    Raises:
        InputError: the parent fits no target, or the target cannot hold it.
        UsageError: top-k above experts, or noise settings out of range.
    """
    model = common.one_dense(models, "sparse upcycling")
    common.check_counts(options.experts, options.top_k, options.router_std)
    routers.check(options, options.experts, options.top_k)
    if not options.noise >= 0 or not 0 <= options.noise_fraction <= 1:
        raise UsageError("--noise should be at least 0 and --noise-fraction between 0 and 1")
    mixture = common.grow(
        model, experts=options.experts, top_k=options.top_k, target=options.target
    )

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units = [
            routers.unit(layer, experts, options),
            *common.neutral_units(mixture, layer),
        ]
        if options.noise:
            return units + _noisy(layer, experts, options), []
        return units, common.copies(layer, experts)

    exactness = common.identical_experts(mixture)
    if options.noise and options.noise_fraction:
        exactness = Exactness("approximate", "noise was added to the experts")
    return routers.asking(common.draft(mixture, fill, exactness), options, options.experts)


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, fill a neutral shared expert, or perturb an expert."""
    done = common.fill_common(work)
    return _perturb(work) if done is None else done


def _perturb(work: Work) -> dict[str, object]:
    import torch

    ffn = dict(zip(PROJECTIONS, work.unit.reads, strict=True))
    width = ffn["gate"].shape[0]
    rng = work.rng("noise", work.layer, work.params["expert"])
    count = round(width * work.params["fraction"])
    touched = torch.from_numpy(rng.permutation(width)[:count])
    for projection, target in zip(PROJECTIONS, work.unit.writes, strict=True):
        matrix = work.read(ffn[projection])
        columns = projection == "down"
        shape = (matrix.shape[0], count) if columns else (count, matrix.shape[1])
        noise = torch.from_numpy(rng.standard_normal(shape, dtype="float32")) * work.params["noise"]
        matrix.index_add_(1 if columns else 0, touched, noise.to(matrix.dtype))
        work.write(target, matrix)
    return {"neurons_with_noise": count}


def _noisy(layer: Layer, experts: Experts, options: Options) -> list[Unit]:
    return [
        Unit(
            f"layer.{layer.index}.expert.{expert}",
            "transform",
            layer.index,
            reads=tuple(layer.ffn[projection] for projection in PROJECTIONS),
            writes=tuple(experts.region(expert, p) for p in PROJECTIONS),
            params={
                "part": "noise",
                "expert": expert,
                "noise": options.noise,
                "fraction": options.noise_fraction,
            },
            memory=16 * experts.hidden * experts.width,
        )
        for expert in range(experts.count)
    ]
