"""Several branches of one seed model: are they, their feed-forwards as experts, and the mean of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...architectures.config import both_rope_spellings
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from ...vocabulary import same_vocabulary
from . import _common as common

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

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


def check(models: Sequence[Model]) -> list[str]:
    """Refuse models that are not branches of one seed as far as headers, configs and tokenizers tell.

    Returns:
        Sentences on what could not be compared.

    Raises:
        InputError: fewer than two models, or what differs.
    """
    if len(models) < 2:
        raise InputError(f"two or more dense models are mixed, {len(models)} was given")
    notes = []
    for model in models:
        common.dense(model)
        _same_shape(models[0], model)
        note = same_vocabulary(models[0].folder, model.folder)
        if note is not None:
            notes.append(note)
    return notes


def identical(models: Sequence[Model]) -> bool:
    """Whether all models are the same files. Equal files in two places are not known to be, short of reading them."""
    return len({tuple(file.resolve() for file in model.checkpoint.files) for model in models}) == 1


def experts(models: Sequence[Model], layer: Layer, found: Experts) -> common.Moves:
    """Every model's feed-forward into the expert of its number."""
    return [
        (
            replace(model.layers[layer.index].ffn[projection], source=number),
            [found.region(number, projection)],
        )
        for number, model in enumerate(models)
        for projection in PROJECTIONS
    ]


def averages(whole: Region, sources: int, layer: int | None) -> list[Unit]:
    """Units that write the mean of one tensor, a block of rows each."""
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


def mean(work: Work) -> dict[str, object]:
    """Write one block's mean, summed in float64."""
    import torch

    (target,) = work.unit.writes
    total = torch.zeros(target.shape, dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    for region in work.unit.reads:
        values = work.read(region).double()
        total += values
        squares += values.square().sum()
    average = total / len(work.unit.reads)
    work.write(target, average)
    # How far the sources lie from their mean, relative to their size: 0 for equal ones.
    spread = 1 - len(work.unit.reads) * float(average.square().sum()) / max(float(squares), 1e-300)
    return {"relative_variance": max(0.0, spread)} if float(squares) else {}


def _same_shape(first: Model, other: Model) -> None:
    """Refuse a model that is not a branch of the first one's seed as far as headers and config tell."""
    if other.family.model_type != first.family.model_type:
        raise InputError(
            f"{other.folder}: is {other.family.model_type}, {first.folder} is {first.family.model_type}",
            hint="only models can be mixed that were trained from one seed model",
        )
    ours, theirs = _settings(first), _settings(other)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{other.config.where}: {key} is {theirs.get(key)!r}, "
                f"{first.folder} has {ours.get(key)!r}",
                hint="embeddings and norms are averaged, so the models have to agree in all settings",
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
