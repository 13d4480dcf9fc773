"""How a grown mixture's routers start: one set of options and one unit a layer, for every method.

* ``normal``: rows from N(0, std^2). The inputs of routers are normed, so that logits have about std times the root of
  the width.
* ``tied``: the same, each row for a group of neighbouring experts, which are selected together or not at all.
* ``zero``: equal logits, where all experts are on anyway.
* ``domains``: rows from a text for each expert, the mean input of the layer's feed-forward on it (see `_texts`).
* ``prompts``: the same, but every line of a text is read by itself and counts equally: the mean over prompts of the
  mean over a prompt's tokens.
* ``logistic``: multinomial logistic regression of the text a token is from on the layer's sampled inputs (see
  `linalg.logistic`). The report has the accuracy on the rows it was fitted to, and that of a fit without every fifth
  sequence on those.

Texts are read by the first model, in the order of the experts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ...plan import Unit
from ..base import DataNeed, Draft, option
from . import _texts as texts

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...calibration.means import Means
    from ...checkpoint.region import Region
    from ...execute import Work

DATA: dict[str, DataNeed] = {"domains": "means", "prompts": "prompts", "logistic": "means"}
"""Routers that need texts, and the statistics they are made from."""


@dataclass(frozen=True, kw_only=True)
class TextRouterOptions:
    """What the user chooses of a router that is made from texts."""

    router_init: str = option(
        "domains",
        "router rows: mean inputs on a text for each expert, the same over its lines as prompts, or a logistic "
        "regression that tells the texts apart",
        choices=("domains", "prompts", "logistic"),
    )
    neutral: bool = option(
        False, "the last --data is neutral text, which the others are centred by"
    )
    temperature: float = option(
        1.0, "divides the router's rows: of length one, or as they were fitted"
    )
    router_l2: float = option(0.01, "penalty on the rows of a logistic router")
    router_sample: int = option(1024, "tokens of each text that a logistic router is fitted to")


@dataclass(frozen=True, kw_only=True)
class RouterOptions(TextRouterOptions):
    """What the user chooses of a router."""

    router_init: str = option(
        "normal",
        "router rows: random; random, one for each --router-group of experts; zeros; or from a --data for each expert: "
        "mean inputs (of the whole text, or of its lines as prompts), or a logistic regression that tells them apart",
        choices=("normal", "tied", "zero", "domains", "prompts", "logistic"),
    )
    router_std: float = option(0.02, "standard deviation of the router's random rows")
    router_group: int = option(2, "experts that share a row of a tied router")


def check(options: TextRouterOptions, experts: int, top_k: int, *, repeat: int = 1) -> None:
    """Refuse routers that select nothing sensible, and options that the chosen one does not have.

    Args:
        repeat: experts that share a row whatever the options say.

    Raises:
        UsageError: a value out of range, or in contradiction to ``--router-init``.
        InputError: counts that do not fit.
    """
    init = options.router_init
    texts.check(options.temperature)
    if not options.router_l2 > 0:
        raise UsageError(
            "--router-l2 should be above 0: texts that differ have no finite fit without"
        )
    if options.router_sample < 10:
        raise UsageError(f"--router-sample should be at least 10, is {options.router_sample}")
    if options.neutral and init not in {"domains", "prompts"}:
        raise UsageError(
            f"--neutral is for routers from mean inputs, --router-init is {init}",
            hint="use --router-init domains or prompts",
        )
    if options.temperature != 1 and init not in DATA:
        raise UsageError(f"--temperature is for routers from texts, --router-init is {init}")
    if not isinstance(options, RouterOptions):
        return
    if init == "zero" and (top_k != experts or repeat > 1):
        raise InputError(
            "--router-init zero would send all tokens to the same experts",
            hint="it is for --top-k equal to --experts, where all are on",
        )
    if init != "tied":
        return
    if repeat > 1:
        raise UsageError("--router-init tied: the rows of this method's groups are tied already")
    if options.router_group < 2:
        raise UsageError(f"--router-group should be at least 2, is {options.router_group}")
    for name, value in (("--experts", experts), ("--top-k", top_k)):
        if value % options.router_group:
            raise InputError(
                f"{name} {value} is not a multiple of --router-group {options.router_group}",
                hint="whole groups are selected; of one in part, chance would select",
            )


def unit(layer: Layer, experts: Experts, options: TextRouterOptions, *, repeat: int = 1) -> Unit:
    """The unit that makes a layer's router, each row ``repeat`` times over."""
    init = options.router_init
    params: dict[str, Any] = {"part": "router", "init": init, "repeat": repeat}
    memory = 16 * experts.count * experts.hidden
    if isinstance(options, RouterOptions):
        params["std"] = options.router_std
        if init == "tied":
            params["repeat"] = options.router_group
    if init in DATA:
        params |= {"temperature": options.temperature, "neutral": options.neutral}
        memory *= 4
    if init == "logistic":
        params["l2"] = options.router_l2
        # The sampled inputs as they are stored, for a fit and in float64.
        memory += 24 * experts.count * experts.hidden * options.router_sample
    name = f"layer.{layer.index}.router"
    return Unit(
        name, "transform", layer.index, writes=(experts.router,), params=params, memory=memory
    )


def asking(draft: Draft, options: TextRouterOptions, rows: int) -> Draft:
    """A draft that says what statistics its routers need, of a text for each row."""
    init = options.router_init
    if init not in DATA:
        return draft
    sample = options.router_sample * rows if init == "logistic" else 0
    return dataclasses.replace(
        draft,
        data=DATA[init],
        sample=max(draft.sample, sample),
        texts=rows + options.neutral,
    )


def decide(
    model: Model, options: TextRouterOptions, statistics: Means, seed: int
) -> dict[str, Any]:
    """What the texts' tokens would select first, by layer, where rows are means; decides nothing else."""
    if options.router_init == "logistic":
        return {str(layer.index): {"texts": statistics.domains} for layer in model.layers}
    return texts.selected(model, statistics, neutral=options.neutral)


def fill(work: Work) -> dict[str, object]:
    """Run the unit of `unit`.

    Raises:
        InputError: a text that is not told from the others, or rows of two groups that coincide as they are stored.
    """
    import torch

    (region,) = work.unit.writes
    params = work.params
    repeat = params["repeat"]
    shape = (region.shape[0] // repeat, region.shape[1])
    metrics: dict[str, object] = {}
    if params["init"] in DATA:
        rows_GD, metrics = texts.router(work)
    elif params["init"] == "zero":
        rows_GD = torch.zeros(shape)
    else:
        draw = work.rng("router", work.layer).standard_normal(shape, dtype="float32")
        rows_GD = torch.from_numpy(draw) * params["std"]
    if repeat > 1:
        _refuse_ties(work, rows_GD, region)
    work.write(region, rows_GD.repeat_interleave(repeat, dim=0))
    return metrics


def _refuse_ties(work: Work, rows_GD: torch.Tensor, region: Region) -> None:
    """Groups whose rows coincide as they are stored would be selected in parts."""
    import torch

    stored = work.stored(region, rows_GD)
    if len(torch.unique(stored.float(), dim=0)) < len(stored):
        raise InputError(
            f"{region.tensor}: rows of two groups are tied in the stored type",
            hint="choose a larger --router-std",
        )
