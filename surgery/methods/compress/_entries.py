"""What a matrix can be stored as: the tensors of every form, and their sizes.

An ``entry`` is a JSON object with a ``form`` and its sizes. Of a linear layer it is one of those in
`modeling/moesurg_linears.py` (``factors``, ``pivot``) and `modeling/moesurg_mixed_linears.py` (``columns``, ``rows``,
``cosine``, ``quantised``). Experts take all of these, stacked along a first axis, and those of
`modeling/moesurg_shared_experts.py` with parts that experts share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...checkpoint.dtypes import nbytes

Shape = tuple[int, int]
Entry = Mapping[str, Any]
Leaf = tuple[str, str, tuple[int, ...]]
"""Name below the module, type and shape; an empty type stands for the matrix's own."""

LOWRANK = ("factors", "pivot")
"""Forms of `modeling/moesurg_linears.py`."""
MATRIX = (*LOWRANK, "columns", "rows", "cosine", "quantised")
"""Forms that a single matrix can have."""


def leaves(entry: Entry, shape: Shape) -> list[Leaf]:
    """The tensors that an entry stores for one matrix [out, in]."""
    rows, columns = shape
    form, rank = entry["form"], entry["rank"]
    if form in LOWRANK:
        return _lowrank(form, shape, rank, "")
    if form in ("columns", "rows"):
        exact = entry["exact"]
        part = (rows, exact) if form == "columns" else (exact, columns)
        inner = (rows, columns - exact) if form == "columns" else (rows - exact, columns)
        name = form.removesuffix("s")
        return [
            *_lowrank(entry["lowrank"], inner, rank, "inner."),
            (f"{form}.weight", "", part),
            (f"{name}_index", "I32", (exact,)),
        ]
    if form == "cosine":
        held = (rows, rank) if entry["side"] == "input" else (rank, columns)
        return [("coefficients.weight", "", held), ("frequencies", "I32", (rank,))]
    bits, group = entry["bits"], entry["group"]
    found: list[Leaf] = [
        ("codes", "U8", (rows, -(-columns // (8 // bits)))),
        ("scales", "", (rows, -(-columns // group))),
    ]
    return [*found, *(_lowrank("factors", shape, rank, "") if rank else [])]


def expert_leaves(entry: Entry, experts: int, shape: Shape) -> list[Leaf]:
    """The tensors that an entry stores for one projection [out, in] of all experts of a layer."""
    form, (outputs, inputs) = entry["form"], shape
    if form in MATRIX:
        return [(name, kind, (experts, *held)) for name, kind, held in leaves(entry, shape)]
    if form == "whole":
        return [("weight", "", (experts, outputs, inputs))]
    if form == "delta":
        rank = entry["rank"]
        return [
            ("base", "", (outputs, inputs)),
            ("left", "", (experts, outputs, rank)),
            ("right", "", (experts, rank, inputs)),
        ]
    if form in ("input", "output"):
        rank, groups = entry["rank"], entry["groups"]
        left, right = (outputs, rank), (rank, inputs)
        if form == "input":
            return [("private", "", (experts, *left)), ("shared", "", (groups, *right))]
        return [("shared", "", (groups, *left)), ("private", "", (experts, *right))]
    if entry.get("transposed"):
        outputs, inputs = inputs, outputs
    inner, bases, rank = entry["inner"], entry["bases"], entry.get("rank", 0)
    found: list[Leaf] = [("private", "", (experts, outputs, inner)), ("mix", "", (experts, bases))]
    if not rank:
        return [*found, ("bases", "", (bases, inner, inputs))]
    return [
        *found,
        ("left", "", (bases, inner - rank, rank)),
        ("right", "", (bases, rank, inputs)),
        ("pivots", "I32", (bases, rank)),
    ]


def size(entry: Entry, shape: Shape, dtype: str) -> int:
    """Bytes that an entry stores for a matrix of a type."""
    return sum(nbytes(kind or dtype, held) for _, kind, held in leaves(entry, shape))


def largest_rank(
    make: Callable[[int], Entry], top: int, shape: Shape, dtype: str, ratio: float
) -> int:
    """The largest rank up to ``top`` whose entry takes at most 1 - ratio of the matrix's bytes; -1 if none does."""
    budget = (1 - ratio) * nbytes(dtype, shape)
    low, high = -1, top
    while low < high:
        middle = (low + high + 1) // 2
        if size(make(middle), shape, dtype) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _lowrank(form: str, shape: Shape, rank: int, prefix: str) -> list[Leaf]:
    rows, columns = shape
    if form == "factors":
        return [
            (f"{prefix}lowrank_A.weight", "", (rank, columns)),
            (f"{prefix}lowrank_B.weight", "", (rows, rank)),
        ]
    return [
        (f"{prefix}pivot_rows.weight", "", (rank, columns)),
        (f"{prefix}pivot_coef.weight", "", (rows - rank, rank)),
        (f"{prefix}pivot_index", "I32", (rank,)),
    ]
