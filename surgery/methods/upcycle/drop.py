"""Drop-Upcycling: each expert is a shuffled copy of the feed-forward with a fraction of its neurons drawn anew.

Drop-Upcycling (ICLR 2025, arXiv:2502.19261). For every layer and expert: shuffle the I neurons by a permutation of its
own, keep the first I_e, choose floor(r * I_e) of them, and overwrite these rows of gate and up and these columns of
down with N(mean, std^2), where mean and (unbiased) std are those of all elements of the block that is replaced, one
block per matrix. r = ``--reinit``, 0.5 by default. Everything else is copied from the dense model.
``--index-set shared`` chooses one set of neurons for the three matrices, as the method describes it; the authors'
script draws a set per matrix, which at r = 0.5 leaves only an eighth of the neurons intact:
``--index-set per-projection``.

``--preset qwen`` is the partition of Qwen1.5-MoE and Qwen2-MoE: shuffled copies of the feed-forward are laid end to
end, as many as the experts need, and expert e takes neurons [e * I_e, (e + 1) * I_e) of that row; what is left of the
last copy is dropped. So narrow experts do not all repeat the same neurons. It asks for ``--expert-width``.
``--shared-width`` builds a shared expert the same way from shuffled copies of its own, with a random sigmoid gate;
a target that requires one gets a neutral one otherwise.

With r = 0 and full width every expert is the dense function with its neurons reordered, and the output is exact where
the selected weights sum to one. Otherwise nothing is promised: the method is a start for training.

Deviation: the router is drawn from N(0, std^2) as in all methods here (or made as ``--router-init`` says); the script's
U[0, 1) has a mean that adds the same number to all logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common
from . import _routers as routers

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...checkpoint.region import Region
    from ...execute import Work

INFO = MethodInfo(
    summary="shuffled copies of every feed-forward, a fraction of their neurons drawn anew",
    paper="arXiv:2502.19261",
    inputs="one dense model",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.RoutedOptions):
    """What the user chooses."""

    reinit: float = option(0.5, "fraction r of each expert's neurons that is drawn anew")
    index_set: str = option(
        "shared",
        "whether the three matrices redraw the same neurons or each its own",
        choices=("shared", "per-projection"),
    )
    expert_width: int | None = option(
        None, "neurons of an expert; by default those of the feed-forward"
    )
    shared_width: int | None = option(None, "neurons of a shared expert made the same way")
    preset: str | None = option(
        None, "qwen cuts narrow experts out of shuffled copies laid end to end", choices=("qwen",)
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The parent's blocks with partly redrawn experts in every layer.

    Raises:
        InputError: the parent fits no target, or an expert would be wider than the feed-forward.
        UsageError: options out of range, or a preset without what it needs.
    """
    model = common.one_dense(models, "drop-upcycling")
    common.check_counts(options.experts, options.top_k, options.router_std)
    routers.check(options, options.experts, options.top_k)
    if not 0 <= options.reinit <= 1:
        raise UsageError(f"--reinit {options.reinit} should be between 0 and 1")
    neurons = model.config.integer("intermediate_size")
    width = _width(options, neurons)
    mixture = common.grow(
        model,
        experts=options.experts,
        top_k=options.top_k,
        target=options.target,
        width=width,
        shared_width=options.shared_width,
    )

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        units = [routers.unit(layer, experts, options)]
        for expert in range(experts.count):
            stream, first = ("routed", expert * width) if options.preset else (f"{expert}", 0)
            writes = tuple(experts.region(expert, projection) for projection in PROJECTIONS)
            units.append(_unit(layer, f"expert.{expert}", writes, stream, first, options))
        if options.shared_width is None:
            units.extend(common.neutral_units(mixture, layer))
        else:
            regions = tuple(mixture.shared(layer).values())
            units.append(_unit(layer, "shared", regions, "shared", 0, options))
        return units, []

    draft = common.draft(mixture, fill, _exactness(mixture, options, width == neurons))
    return routers.asking(draft, options, options.experts)


decide = routers.decide


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, fill a neutral shared expert, or shuffle, cut and redraw one expert."""
    done = common.fill_common(work)
    return _expert(work) if done is None else done


def _width(options: Options, neurons: int) -> int:
    if options.preset and options.expert_width is None:
        raise UsageError(f"--preset {options.preset} needs --expert-width")
    for flag, value in (
        ("--expert-width", options.expert_width),
        ("--shared-width", options.shared_width),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{flag} should be at least 1, is {value}")
    width = neurons if options.expert_width is None else options.expert_width
    if width > neurons or (options.preset and width == neurons):
        raise InputError(
            f"--expert-width {width}: the feed-forward has {neurons} neurons",
            hint="an expert is at most as wide"
            + (", and with --preset qwen narrower" if options.preset else ""),
        )
    return width


def _exactness(mixture: common.Mixture, options: Options, whole: bool) -> Exactness:
    if int(mixture.width * options.reinit):
        return Exactness("approximate", f"{options.reinit:.0%} of every expert's neurons are new")
    if not whole:
        return Exactness("approximate", "experts are narrower than the feed-forward")
    if options.shared_width is not None:
        return Exactness("approximate", "a shared expert was added")
    return common.identical_experts(mixture)


def _unit(
    layer: Layer,
    label: str,
    writes: tuple[Region, ...],
    stream: str,
    first: int,
    options: Options,
) -> Unit:
    neurons, hidden = layer.ffn["gate"].shape
    width = writes[0].shape[0]
    return Unit(
        f"layer.{layer.index}.{label}",
        "transform",
        layer.index,
        reads=tuple(layer.ffn[projection] for projection in PROJECTIONS),
        writes=writes,
        params={
            "part": "expert",
            "label": label,
            "stream": stream,
            "first": first,
            "reinit": options.reinit,
            "shared_set": options.index_set == "shared",
            "std": options.router_std,
        },
        # One whole projection, what is kept of it, and doubles for the moments.
        memory=4 * hidden * (2 * neurons + 6 * width),
    )


def _expert(work: Work) -> dict[str, object]:
    import torch

    params, layer = work.params, work.layer
    width = work.unit.writes[0].shape[0]
    neurons = work.unit.reads[0].shape[0]
    kept = torch.from_numpy(_cut(work, neurons, params["first"], width))
    count = int(width * params["reinit"])
    metrics: dict[str, Any] = {"neurons_redrawn": count}
    for projection, source, target in zip(
        PROJECTIONS, work.unit.reads, work.unit.writes[:3], strict=True
    ):
        axis = 1 if projection == "down" else 0
        matrix = work.read(source).index_select(axis, kept)
        which = "neurons" if params["shared_set"] else projection
        order = work.rng("redrawn", layer, params["label"], which).permutation(width)
        if count:
            redraw = work.rng("reinit", layer, params["label"], projection)
            mean, std = _redraw(matrix, axis, torch.from_numpy(order[:count]), redraw)
            metrics |= {f"{projection}_mean": mean, f"{projection}_std": std}
        work.write(target, matrix)
    for switch in work.unit.writes[3:]:
        draw = work.rng("switch", layer).standard_normal(switch.shape, dtype="float32")
        work.write(switch, torch.from_numpy(draw) * params["std"])
    return metrics


def _cut(work: Work, neurons: int, first: int, count: int) -> np.ndarray[Any, Any]:
    """Neurons ``first`` to ``first + count`` of shuffled copies laid end to end."""
    import numpy as np

    pieces = []
    while count:
        copy, start = divmod(first, neurons)
        order = work.rng("shuffle", work.layer, work.params["stream"], copy).permutation(neurons)
        pieces.append(order[start : start + count])
        first, count = first + len(pieces[-1]), count - len(pieces[-1])
    return np.concatenate(pieces)


def _redraw(
    matrix: torch.Tensor, axis: int, chosen: torch.Tensor, rng: np.random.Generator
) -> tuple[float, float]:
    """Overwrite the chosen rows or columns in place; returns mean and std of what they held."""
    import torch

    block = matrix.index_select(axis, chosen).double()
    mean, std = float(block.mean()), float(block.std())
    draw = torch.from_numpy(rng.standard_normal(tuple(block.shape), dtype="float32"))
    matrix.index_copy_(axis, chosen, (draw * std + mean).to(matrix.dtype))
    return mean, std
