"""Numbers that change from layer to layer: ranks of adapters and of experts, numbers of experts.

MoLA (arXiv:2402.08562) gives the quarters of a model a number each: ``mola:2468`` is its inverted triangle, ``8642``
the triangle, ``8228`` the hourglass, ``5555`` the same everywhere.

The six shapes are in the style of DynaMoE (arXiv:2603.01697), whose abstract names them without formulas; these are
ours. With t = l / (L - 1) of L layers, and lo, hi the least and the most,

    n_l = floor(lo + (hi - lo) f(t) + 1/2)

    uniform 1      descending 1 - t        ascending t
    pyramid-up 1 - |2t - 1|   pyramid-down |2t - 1|   wave (1 + sin 2 pi t) / 2

A model of one layer has t = 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from .errors import UsageError

SHAPES: dict[str, Callable[[float], float]] = {
    "uniform": lambda t: 1.0,
    "descending": lambda t: 1.0 - t,
    "ascending": lambda t: t,
    "pyramid-up": lambda t: 1.0 - abs(2.0 * t - 1.0),
    "pyramid-down": lambda t: abs(2.0 * t - 1.0),
    "wave": lambda t: (1.0 + math.sin(2.0 * math.pi * t)) / 2.0,
}
"""Height between 0 and 1 at a depth between 0 and 1."""

GRAMMAR = (
    "uniform:8, descending:2-8 (or ascending, pyramid-up, pyramid-down, wave), mola:2468 or 4,4,2,2"
)
"""How a schedule is written, for help texts."""

_DIGITS = 1e-9
"""What rounding of f(t) may take from a number that is a half by its formula."""


def shaped(name: str, layers: int, low: int, high: int) -> list[int]:
    """One of the six shapes.

    Args:
        name: of `SHAPES`.
        layers: numbers to make, at least 1.
        low, high: the least and the most, low <= high.

    Raises:
        UsageError: an unknown shape, or a range that runs backwards.
    """
    if name not in SHAPES:
        raise UsageError(f"there is no schedule {name!r}", hint=f"use {GRAMMAR}")
    if layers < 1 or not 0 <= low <= high:
        raise UsageError(f"schedule {name}: {low}-{high} is no range of numbers", hint=GRAMMAR)
    depths = [index / (layers - 1) if layers > 1 else 0.0 for index in range(layers)]
    return [math.floor(low + (high - low) * SHAPES[name](t) + 0.5 + _DIGITS) for t in depths]


def mola(numbers: list[int], layers: int) -> list[int]:
    """A number for each of as many equal parts of the model as there are numbers; layer l is in part floor(nl/L).

    Raises:
        UsageError: more parts than layers, or no number.
    """
    if not 1 <= len(numbers) <= layers:
        raise UsageError(f"{layers} layers have no {len(numbers)} parts")
    return [numbers[index * len(numbers) // layers] for index in range(layers)]


def parse(text: str, layers: int, option: str) -> list[int]:
    """A schedule as the user writes it, one number a layer.

    Args:
        text: a shape with its range, ``mola:`` with a digit (or a number, separated by commas) for each part, or
            a number for every layer, separated by commas.
        layers: how many layers there are to give a number.
        option: names the option in errors.

    Raises:
        UsageError: anything else.
    """
    name, colon, rest = text.strip().partition(":")
    if not colon:
        numbers = _numbers(text, option)
        if len(numbers) not in (1, layers):
            raise UsageError(
                f"{option}: gives {len(numbers)} numbers for {layers} layers", hint=f"use {GRAMMAR}"
            )
        return numbers * layers if len(numbers) == 1 else numbers
    if name == "mola":
        numbers = _numbers(rest, option) if "," in rest else [int(digit) for digit in _digits(rest)]
        if not numbers:
            raise UsageError(f"{option}: {text!r} is no schedule", hint=f"use {GRAMMAR}")
        return mola(numbers, layers)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rest.strip(), re.ASCII)
    if name not in SHAPES or match is None or (match[2] is None and name != "uniform"):
        raise UsageError(f"{option}: {text!r} is no schedule", hint=f"use {GRAMMAR}")
    low, high = int(match[1]), int(match[2] or match[1])
    return shaped(name, layers, low, high)


def _digits(text: str) -> str:
    return text.strip() if re.fullmatch(r"\d+", text.strip(), re.ASCII) else ""


def _numbers(text: str, option: str) -> list[int]:
    pieces = [piece.strip() for piece in text.split(",")]
    if not all(re.fullmatch(r"\d+", piece, re.ASCII) for piece in pieces):
        raise UsageError(f"{option}: {text!r} is no schedule", hint=f"use {GRAMMAR}")
    return [int(piece) for piece in pieces]
