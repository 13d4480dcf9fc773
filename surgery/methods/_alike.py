"""Whether several models are branches of one seed, as far as configs and headers tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..architectures.config import both_rope_spellings
from ..errors import InputError

if TYPE_CHECKING:
    from ..architectures.model import Model

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


def same_settings(first: Model, other: Model) -> None:
    """Refuse a model that computes in another way than the first one.

    Raises:
        InputError: another family, or the first setting that differs.
    """
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


def same_tensors(first: Model, other: Model, *, types: bool = True) -> None:
    """Refuse a model whose tensors have other names than the first one's.

    A head that is stored although the config ties it to the embedding is nobody's: it may be there or not.

    Args:
        types: whether element types have to be the same too.

    Raises:
        InputError: the first name or type that differs.
    """
    spare = {first.family.head} if first.config.tied else set()
    names, others = set(first.names()), set(other.names())
    for name in sorted((names ^ others) - (set() if types else spare)):
        has, lacks = (first, other) if name in names else (other, first)
        raise InputError(
            f"{lacks.folder}: has no tensor {name!r}, {has.folder} has",
            hint="moesurg convert --layout stores the experts of both in one way"
            if first.is_moe
            else None,
        )
    for name in first.names() if types else ():
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
