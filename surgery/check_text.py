"""The token ids on which ``verify`` measures how far an output is from its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calibration.corpus import default_corpus
from .calibration.sequences import tokenise
from .errors import InputError
from .seeding import stream

if TYPE_CHECKING:
    from .architectures.model import Model


def check_ids(model: Model, tokens: int, length: int) -> list[list[int]]:
    """Token ids of the built-in text, or fixed pseudo-random ones where the folder has no tokenizer."""
    try:
        found = tokenise(default_corpus(), model.folder, tokens=tokens, seq_len=length)
        return [[int(token) for token in ids] for ids in found.ids]
    except InputError:
        ids = [int(token) for token in stream(0, "verify").integers(0, model.config.vocab, tokens)]
        return [ids[at : at + length] for at in range(0, tokens, length)]
