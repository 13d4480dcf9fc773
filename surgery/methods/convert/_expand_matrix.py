"""What the tensors of an entry of `compress` stand for: one matrix, float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ..compress._entries import LOWRANK, Entry, Shape

if TYPE_CHECKING:
    import torch

    from ...execute import Work


def entry_matrix(work: Work) -> torch.Tensor:
    """The matrix that a unit's reads stand for, float64."""
    held = {
        leaf: work.read(region)
        for leaf, region in zip(work.params["leaves"], work.unit.reads, strict=True)
    }
    rows, columns = work.unit.writes[0].shape
    where = work.unit.reads[0].tensor
    return matrix(work.params["entry"], held, (rows, columns), where)


def matrix(
    entry: Entry, held: Mapping[str, torch.Tensor], shape: Shape, where: str
) -> torch.Tensor:
    """What an entry's tensors stand for, float64 [out, in].

    Args:
        held: the tensors of one matrix by name below its module; of experts, those of one expert and what it shares.
        where: a tensor to name in an error.

    Raises:
        InputError: an index that is not ascending or leaves the matrix.
    """
    form = entry["form"]
    if form == "whole":
        return held["weight"].double()
    if form in ("input", "output"):
        factors = [held[leaf].double() for leaf in ("private", "shared")]
        left, right = factors if form == "input" else reversed(factors)
        return left @ right
    if form == "delta":
        return held["base"].double() + held["left"].double() @ held["right"].double()
    if form == "bases":
        return _mixed_bases(entry, held, where)
    if form in LOWRANK:
        return _product(form, held, "", where)
    if form in ("columns", "rows"):
        return _with_exact(entry, held, shape, where)
    if form == "cosine":
        from ...linalg.cosine import cosine_basis

        size = shape[entry["side"] == "input"]
        basis = cosine_basis(size)[_ascending(held["frequencies"], size, where)]
        given = held["coefficients.weight"].double()
        return given @ basis if entry["side"] == "input" else basis.T @ given
    import torch

    from ...linalg.quantise import unpacked

    codes = held["codes"].to(torch.uint8)
    scales = held["scales"].double()
    dense = unpacked(codes, scales, entry["group"], entry["bits"], shape[1]).dense()
    return dense + _product("factors", held, "", where) if entry["rank"] else dense


def _product(form: str, held: Mapping[str, torch.Tensor], prefix: str, where: str) -> torch.Tensor:
    """A matrix of low rank from two factors or pivot rows."""
    if form == "factors":
        left, right = (held[f"{prefix}lowrank_{name}.weight"].double() for name in "BA")
        return left @ right
    from ...linalg.pivot import Pivoted

    rows = held[f"{prefix}pivot_rows.weight"].double()
    coef = held[f"{prefix}pivot_coef.weight"].double()
    size = rows.shape[0] + coef.shape[0]
    return Pivoted(rows, coef, _ascending(held[f"{prefix}pivot_index"], size, where)).unpack()


def _with_exact(
    entry: Entry, held: Mapping[str, torch.Tensor], shape: Shape, where: str
) -> torch.Tensor:
    """Some columns or rows as they are, the others of low rank."""
    import torch

    columns = entry["form"] == "columns"
    rest = _product(entry["lowrank"], held, "inner.", where)
    exact = held[f"{entry['form']}.weight"].double()
    # Rows are the columns of the transpose.
    if not columns:
        rest, exact = rest.T, exact.T
    size = shape[columns]
    index = _ascending(held["column_index" if columns else "row_index"], size, where)
    others = torch.ones(size, dtype=torch.bool)
    others[index] = False
    whole = rest.new_empty(rest.shape[0], size)
    whole[:, index], whole[:, others] = exact, rest
    return whole if columns else whole.T.contiguous()


def _mixed_bases(entry: Entry, held: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    """A private factor of a function of mixed bases."""
    from ...linalg.bases import Mixed
    from ...linalg.pivot import Pivoted

    bases: list[Any]
    if entry.get("rank"):
        index = held["pivots"]
        parts = zip(held["right"].double(), held["left"].double(), index, strict=True)
        bases = [
            Pivoted(right, left, _ascending(places, entry["inner"], where))
            for right, left, places in parts
        ]
    else:
        bases = list(held["bases"].double())
    made = Mixed(
        [held["private"].double()],
        held["mix"].double()[None],
        bases,
        entry.get("activation", "silu"),
        bool(entry.get("transposed")),
        (0.0, 0.0),
    )
    found: torch.Tensor = made.weight(0)
    return found


def _ascending(index: torch.Tensor, size: int, where: str) -> torch.Tensor:
    """An index of different places below a size.

    Raises:
        InputError: it is something else.
    """
    places = index.long()
    if len(places) and (
        bool((places.diff() <= 0).any()) or int(places[0]) < 0 or int(places[-1]) >= size
    ):
        raise InputError(f"{where}: its index should hold ascending places below {size}")
    return places
