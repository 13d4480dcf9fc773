"""Which experts, in which layers: what the user writes, read once for all methods. Needs no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    from ...architectures.model import Model

GRAMMAR = "experts such as 3,7 or 8-11 for all layers, or by layer: 0:3,7;1:2,5 or 0-3:7"
"""How lists of experts are written, for help texts."""

_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


def parse_numbers(text: str, option: str) -> list[int]:
    """Numbers and ranges separated by commas, in the order given.

    Raises:
        UsageError: anything else, a number given twice, or a range that runs backwards.
    """
    found: list[int] = []
    for piece in text.split(","):
        match = _RANGE.fullmatch(piece.strip())
        first, last = (None, None) if match is None else (int(match[1]), int(match[2] or match[1]))
        if first is None or last is None or last < first:
            raise UsageError(f"{option}: {piece.strip()!r} is no number and no range", hint=GRAMMAR)
        found.extend(range(first, last + 1))
    if len(set(found)) != len(found):
        raise UsageError(f"{option}: {text!r} names a number twice", hint=GRAMMAR)
    return found


def parse_which(text: str, option: str, model: Model) -> dict[int, list[int]]:
    """The experts named for each mixture of a model, in the order given; layers that are not named have none.

    Raises:
        UsageError: not in the grammar, a layer without experts, or an expert that does not exist.
    """
    layers = [layer.index for layer in model.moe_layers]
    found: dict[int, list[int]] = {index: [] for index in layers}
    if ":" not in text:
        everywhere = parse_numbers(text, option)
        found = {index: list(everywhere) for index in layers}
    else:
        named: set[int] = set()
        for part in text.split(";"):
            place, _, wanted = part.partition(":")
            for index in parse_numbers(place, option):
                if index not in found or index in named:
                    wrong = "is named twice" if index in named else "has no experts"
                    raise UsageError(f"{option}: layer {index} {wrong}", hint=GRAMMAR)
                named.add(index)
                found[index] = parse_numbers(wanted, option)
    for index, experts in found.items():
        for expert in experts:
            if expert >= model.experts:
                raise UsageError(
                    f"{option}: layer {index} has no expert {expert}, its last is {model.experts - 1}"
                )
    return found
