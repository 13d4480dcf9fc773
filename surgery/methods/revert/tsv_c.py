"""Take one fine-tune out of a pack that ``merge --method tsv-c`` wrote.

    theta = theta_0 + L_i R_i

for every matrix whose change is stored as two factors, added in float64 and rounded once to the type the fine-tune
had; everything else comes back byte for byte. Config is the fine-tune's own, tokenizer files are the base's, whose
vocabulary was compared when the pack was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...plan import Unit, copy_unit
from ..base import Draft, Exactness, MethodInfo
from ..models.tsv_c import pieces
from ._task import TaskOptions as Options

if TYPE_CHECKING:
    from ...execute import Work
    from ...packs import Pack

__all__ = ["INFO", "Options", "plan", "transform"]

INFO = MethodInfo(
    summary="a model from a pack of low-rank changes",
    paper="arXiv:2412.00081",
    inputs="a pack written by merge --method tsv-c",
    data="none",
    takes="packs",
)


def plan(packs: Sequence[Pack], options: Options) -> Draft:
    """Every tensor of the fine-tune."""
    pack = packs[0]
    index = pack.index(options.task)
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    full = True
    for name, part in pack.parts.items():
        shape = pack.shape(f"base.{name}")
        target = Region(name, shape)
        specs.append(TensorSpec(name, part["dtypes"][index], shape))
        if part["rank"] is None:
            units.append(copy_unit(name, [(Region(f"{index}.{name}", shape), [target])]))
            continue
        full = False
        keys = [f"base.{name}", f"{index}.{name}.left", f"{index}.{name}.right"]
        matrix = shape[-2] * shape[-1]
        units.append(
            Unit(
                name,
                "transform",
                reads=tuple(Region(key, pack.shape(key)) for key in keys),
                writes=pieces(target),
                memory=8 * 4 * matrix,
            )
        )
    return Draft(
        dict(pack.tasks[index]["config"]),
        specs,
        units,
        Exactness("bitwise", "every tensor was stored in full")
        if full
        else Exactness("approximate", "changes come back at the rank at which they were stored"),
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    base, left, right = (pieces(region) for region in work.unit.reads)
    for target, *parts in zip(work.unit.writes, base, left, right, strict=True):
        old, first, second = (work.read(region).double() for region in parts)
        work.write(target, old + first @ second)
    return {}
