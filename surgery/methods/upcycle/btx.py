"""Branch-Train-MiX: the feed-forwards of several models of one shape become experts, everything else their average.

Branch-Train-MiX (arXiv:2403.07816). Expert e of every layer is model e's feed-forward, byte for byte; attention, norms,
embeddings and head are the plain mean over the N models, summed in float64 and rounded once to the stored type; the
router is new, N(0, std^2). The published recipe counts the seed model among the experts and selects two per token.

    MoE(x) = sum_{i in top-k} w_i(x) FFN_i(x),    theta = (1 / N) sum_i theta_i

The models have to be branches of one seed: the same architecture, shapes, types and settings, and the same vocabulary,
because row t of the averaged embedding has to mean the same token everywhere. Anything else is refused with what
differs. Token ids for begin, end and padding may differ; the first model's stay, like its tokenizer files.

N times the same model gives that model's function wherever the target's weights sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...architectures.config import both_rope_spellings
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from ...vocabulary import same_vocabulary
from ..base import Draft, Exactness, MethodInfo, option
from . import _common as common

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

INFO = MethodInfo(
    summary="several models of one shape: feed-forwards become experts, the rest is averaged",
    paper="arXiv:2403.07816",
    inputs="two or more dense models",
    data="none",
)

BLOCK = 4 << 20
"""Elements averaged at a time."""
UNRELATED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Config keys that do not decide what a model computes from token ids."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    top_k: int = option(2, "experts each token selects")
    target: str | None = option(
        None, "MoE family to write; by default the one that fits the parents"
    )
    router_std: float = option(0.02, "standard deviation of the router's random rows")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """The averaged blocks with one expert from every model.

    Raises:
        InputError: fewer than two models, or models that differ in more than their weights.
        UsageError: counts out of range.
    """
    if len(models) < 2:
        raise InputError(f"btx takes two or more dense models, {len(models)} was given")
    first = models[0]
    common.check_counts(len(models), options.top_k, options.router_std)
    notes = []
    for model in models:
        common.dense(model)
        _same_shape(first, model)
        note = same_vocabulary(first.folder, model.folder)
        if note is not None:
            notes.append(note)
    mixture = common.grow(first, experts=len(models), top_k=options.top_k, target=options.target)

    def fill(layer: Layer, experts: Experts) -> tuple[list[Unit], common.Moves]:
        moves: common.Moves = [
            (
                replace(model.layers[layer.index].ffn[projection], source=number),
                [experts.region(number, projection)],
            )
            for number, model in enumerate(models)
            for projection in PROJECTIONS
        ]
        router = common.router_unit(layer, experts, options.router_std)
        return [router, *common.neutral_units(mixture, layer)], moves

    def keep(name: str, layer: int | None) -> list[Unit]:
        return _averages(first.whole(name), len(models), layer)

    return common.draft(mixture, fill, _exactness(mixture, models), keep=keep, notes=notes)


def transform(work: Work) -> dict[str, object]:
    """Draw router rows, fill a neutral shared expert, or average one block of a tensor."""
    import torch

    done = common.fill_common(work)
    if done is not None:
        return done
    (target,) = work.unit.writes
    total = torch.zeros(target.shape, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for region in work.unit.reads:
        values = work.read(region).double()
        total += values
        squares += values.square().sum()
    mean = total / len(work.unit.reads)
    work.write(target, mean)
    # How far the sources lie from their mean, relative to their size: 0 for equal ones.
    spread = 1 - len(work.unit.reads) * float(mean.square().sum()) / max(float(squares), 1e-300)
    return {"relative_variance": max(0.0, spread)} if float(squares) else {}


def _averages(whole: Region, sources: int, layer: int | None) -> list[Unit]:
    rows = whole.shape[0] if whole.shape else 1
    step = max(1, BLOCK * rows // max(1, whole.count))
    units = []
    for start in range(0, rows, step):
        block = whole.rows(start, min(rows, start + step)) if whole.shape else whole
        units.append(
            Unit(
                f"mean.{whole.tensor}.{start}",
                "transform",
                layer,
                reads=tuple(replace(block, source=source) for source in range(sources)),
                writes=(block,),
                params={"part": "mean"},
                memory=48 * block.count,
            )
        )
    return units


def _same_shape(first: Model, other: Model) -> None:
    """Refuse a model that is not a branch of the first one's seed as far as headers and config tell."""
    if other.family.model_type != first.family.model_type:
        raise InputError(
            f"{other.folder}: is {other.family.model_type}, {first.folder} is {first.family.model_type}",
            hint="btx mixes models that were trained from one seed model",
        )
    ours, theirs = _settings(first), _settings(other)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{other.config.where}: {key} is {theirs.get(key)!r}, "
                f"{first.folder} has {ours.get(key)!r}",
                hint="btx averages attention and embeddings, so the models must agree in all settings",
            )
    names, others = set(first.names()), set(other.names())
    for name in sorted(names ^ others):
        has, lacks = (first, other) if name in names else (other, first)
        raise InputError(f"{lacks.folder}: has no tensor {name!r}, {has.folder} has")
    for name in first.names():
        if first.dtype(name) != other.dtype(name):
            raise InputError(
                f"{other.folder}: tensor {name!r} is {other.dtype(name)}, "
                f"{first.folder} has {first.dtype(name)}",
                hint="store the models in one type first",
            )


def _settings(model: Model) -> dict[str, Any]:
    config = both_rope_spellings(model.config.completed())
    config.update(head_dim=model.config.head_dim, num_key_value_heads=model.config.kv_heads)
    return {
        key: value
        for key, value in config.items()
        if key not in UNRELATED and value is not None and value is not False
    }


def _exactness(mixture: common.Mixture, models: Sequence[Model]) -> Exactness:
    files = {tuple(file.resolve() for file in model.checkpoint.files) for model in models}
    if len(files) == 1:
        return common.identical_experts(mixture)
    return Exactness(
        "approximate",
        "experts of different files are mixed, and attention and embeddings are their average",
    )
