"""How what a custom output stores becomes the tensors of its stock class, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from .._stored import ROW_MAP

if TYPE_CHECKING:
    import torch

    from ...custom import CustomModel
    from ...execute import Work

MIXTURES = "moesurg_mixtures"
"""The key of the config, as in `modeling/`, whose files import torch."""


LACKS = {
    "moesurg_bam": "has no router over attentions",
    "moesurg_null_experts": "has no experts without a feed-forward",
    "moesurg_read_me": "has no router before its layers",
}
"""By key of the config, what stock classes do not have that such a part needs."""


@dataclass(frozen=True)
class Piece:
    """Some stored tensors and what they become.

    Attributes:
        stored: names of the tensors that are read and not passed on.
        specs: the tensors in their place.
        units: the work that writes these.
    """

    stored: tuple[str, ...]
    specs: tuple[TensorSpec, ...]
    units: tuple[Unit, ...]


def pieces(model: CustomModel) -> Iterator[Piece]:
    """Everything of a model that its stock class does not know.

    Raises:
        InputError: a part that stock classes cannot hold, or tensors that do not fit the config.
    """
    known = _parts()
    for key, entry in model.parts.items():
        if key not in known:
            raise InputError(
                f"{model.folder}: its {key} cannot be stored as stock {model.family.class_name}"
                + (f", which {LACKS[key]}" if key in LACKS else ""),
                hint="eval and verify take it as it is",
            )
        if not isinstance(entry, Mapping):
            raise InputError(f"{model.folder / 'config.json'}: {key} is not an object")
        yield from known[key](model, entry)


def stored(model: CustomModel, name: str, axes: int = 2) -> Region:
    """A tensor that the config promises.

    Raises:
        InputError: it is missing, or has another number of axes.
    """
    info = model.checkpoint.tensors.get(name)
    if info is None:
        raise InputError(f"{model.folder}: tensor {name!r} is missing")
    if len(info.shape) != axes:
        raise InputError(
            f"{model.folder}: tensor {name!r} has the shape {list(info.shape)}, expected {axes} axes"
        )
    return Region(name, info.shape)


def fits(model: CustomModel, name: str, *, found: object, expected: object) -> None:
    """Raise InputError where a size of a tensor is not what the others and the config say."""
    if found != expected:
        raise InputError(
            f"{model.folder}: tensor {name!r} has {found}, the config and its other tensors say {expected}"
        )


def layer_of(name: str) -> int | None:
    """The decoder layer that a module of a base model belongs to."""
    head, _, rest = name.partition("layers.")
    index = rest.partition(".")[0]
    return int(index) if not head and index.isdigit() else None


def _mixtures(model: CustomModel, entry: Mapping[str, Any]) -> Iterator[Piece]:
    """Router rows that share experts: each expert once for every row that means it, as a tied merge writes it."""
    if not entry.get("mapped"):
        raise InputError(
            f"{model.folder}: its layers have different numbers of experts, which stock "
            f"{model.family.class_name} cannot hold",
            hint="eval and verify take it as it is",
        )
    names, layers = entry["experts"], entry["layers"]
    for index, count in layers.items():
        prefix = model.family.prefix.format(layer=index)
        place = names[0].rpartition(".")[0]
        rows = stored(model, f"{prefix}{place}.{ROW_MAP}", axes=1)
        yield Piece((rows.tensor,), (), ())
        for name in names:
            info = model.checkpoint.tensors.get(prefix + name)
            if info is None:
                raise InputError(f"{model.folder}: tensor {prefix + name!r} is missing")
            fits(model, info.name, found=info.shape[0], expected=count)
            read = Region(info.name, info.shape)
            written = Region(info.name, (*rows.shape, *info.shape[1:]))
            size = written.count // rows.shape[0]
            units = [
                Unit(
                    f"layer.{index}.{name}.{row}",
                    "transform",
                    int(index),
                    reads=(rows, read),
                    writes=(written.rows(row, row + 1),),
                    params={"form": "mapped", "row": row},
                    memory=12 * size,
                )
                for row in range(rows.shape[0])
            ]
            yield Piece(
                (info.name,), (TensorSpec(written.tensor, info.dtype, written.shape),), tuple(units)
            )


def _mapped_row(work: Work) -> torch.Tensor:
    """The expert that a row of the router means."""
    rows, experts = work.unit.reads
    expert = int(work.read(rows)[work.params["row"]])
    if not 0 <= expert < experts.shape[0]:
        raise InputError(
            f"{rows.tensor}: row {work.params['row']} means expert {expert} of {experts.shape[0]}"
        )
    return work.read(experts.rows(expert, expert + 1))


def expanded(work: Work) -> torch.Tensor:
    """The matrix that a unit's reads stand for, float64."""
    if work.params["form"] == "mapped":
        return _mapped_row(work)
    if work.params["form"] in ("change", "ternary"):
        from ._expand_experts import multiplied

        return multiplied(work)
    from ._expand_matrix import entry_matrix

    return entry_matrix(work)


def _parts() -> dict[str, Callable[[CustomModel, Mapping[str, Any]], Iterator[Piece]]]:
    """By key of the config: how that part becomes stock tensors."""
    from ..compress._expert_form import KEY as EXPERTS
    from ..compress._replace import LINEARS, MIXED
    from ._expand_experts import LOWRANK, TERNARY, lowrank, ternary
    from ._expand_parts import experts, linears, mixed

    return {
        LINEARS: linears,
        MIXED: mixed,
        EXPERTS: experts,
        MIXTURES: _mixtures,
        LOWRANK: lowrank,
        TERNARY: ternary,
    }
