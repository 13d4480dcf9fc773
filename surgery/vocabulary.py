"""Whether two checkpoints' tokenizers give every token id the same meaning. Reads JSON, runs no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint.header import read_json
from .checkpoint.reader import contained, file_digest
from .errors import InputError

TOKENIZER = "tokenizer.json"
OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Vocabulary files of folders without ``tokenizer.json``."""


def same_vocabulary(first: Path, second: Path) -> str | None:
    """Compare two folders.

    Returns:
        None if tokens and merges are the same, or a sentence on why they could not be compared.

    Raises:
        InputError: they differ, naming the first token that does.
    """
    both = (first / TOKENIZER).exists() and (second / TOKENIZER).exists()
    if both:
        # Fine-tunes usually have their base's file; reading it as JSON takes seconds.
        if len({file_digest(contained(folder, TOKENIZER)) for folder in (first, second)}) > 1:
            _compare(first, second)
        return None
    ours, theirs = _files(first), _files(second)
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return f"{second} and {first} have no tokenizer file in common, so vocabularies were not compared"
    for name in shared:
        if ours[name] != theirs[name]:
            raise InputError(
                f"{second / name}: differs from {first / name}, so token ids may mean other tokens",
                hint="only models with one vocabulary can be averaged",
            )
    return None


def _compare(first: Path, second: Path) -> None:
    ours, theirs = _tokenizer(first), _tokenizer(second)
    tokens, others = _tokens(ours, first), _tokens(theirs, second)
    for index in sorted(tokens.keys() | others.keys()):
        if tokens.get(index) != others.get(index):
            raise InputError(
                f"{second / TOKENIZER}: token {index} is {others.get(index)!r}, "
                f"in {first} it is {tokens.get(index)!r}",
                hint="only models with one vocabulary can be averaged",
            )
    if _merges(ours) != _merges(theirs):
        raise InputError(
            f"{second / TOKENIZER}: has other merges than {first / TOKENIZER}, "
            "so the same text becomes other tokens",
            hint="only models with one vocabulary can be averaged",
        )


def _tokenizer(folder: Path) -> dict[str, Any]:
    return read_json(contained(folder, TOKENIZER))


def _tokens(tokenizer: Mapping[str, Any], folder: Path) -> dict[int, str]:
    """Text by id: a map in most models, a list of pairs in Unigram, and the added tokens on top."""
    try:
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, Mapping):
            found = {int(index): str(text) for text, index in vocabulary.items()}
        else:
            found = {index: str(text) for index, (text, _) in enumerate(vocabulary)}
        for entry in tokenizer.get("added_tokens") or ():
            found[int(entry["id"])] = str(entry["content"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / TOKENIZER}: has no readable vocabulary ({error!r})") from error
    return found


def _merges(tokenizer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Pairs, which files spell as ``"a b"`` or as ``["a", "b"]``."""
    return [
        tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair)
        for pair in tokenizer["model"].get("merges") or ()
    ]


def _files(folder: Path) -> dict[str, str]:
    return {
        name: file_digest(contained(folder, name)) for name in OTHERS if (folder / name).exists()
    }
