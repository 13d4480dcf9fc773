"""Tensors that adapters save in full (``modules_to_save``) in a merge.

They belong to no low-rank rule. One adapter's are copied, and so are those of several adapters that all hold the same
values. Where values differ, or an adapter lacks a tensor and so means the base's, the merge is refused, or

    mean:   sum over the adapters that hold it of w_i t_i / sum of their w_i, rounded once
    first:  that of the first adapter that holds it

as ``--full-tensors`` says. Adding up changes against the base would need the base, which no merge of adapters reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING

from ...adapters.output import placed, widest
from ...checkpoint.layout import TensorSpec
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..models._merge import blocks_of

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...checkpoint.region import Region
    from ...execute import Work

    Transform = Callable[[Work], dict[str, object]]

MODES = ("refuse", "mean", "first")
HINT = "--full-tensors mean or first, or take modules_to_save out of the adapters"


def plan(
    adapters: Sequence[Adapter], weights: Sequence[float], mode: str
) -> tuple[list[TensorSpec], list[Unit]]:
    """The full tensors of the output and a unit for each.

    Raises:
        InputError: tensors of different shapes, or, with ``refuse``, one that an adapter lacks.
        UsageError: a mean with weights that add up to zero.
    """
    specs: list[TensorSpec] = []
    units: list[Unit] = []
    for name in sorted({name for adapter in adapters for name in adapter.full}):
        held = {
            index: placed(adapter.full[name], index)
            for index, adapter in enumerate(adapters)
            if name in adapter.full
        }
        first = next(iter(held))
        region = adapters[first].full[name]
        types = [adapters[index].checkpoint.tensors[region.tensor].dtype for index in held]
        for index, other in held.items():
            if other.shape != region.shape:
                raise InputError(
                    f"{adapters[index].folder}: {name} is {list(other.shape)}, that of {adapters[first].folder} is "
                    f"{list(region.shape)}",
                    hint="adapters that are merged have to belong to one base model",
                )
        if mode == "refuse" and len(held) < len(adapters):
            lacking = next(a.folder for i, a in enumerate(adapters) if i not in held)
            raise InputError(
                f"{adapters[first].folder}: holds {name} in full, {lacking} does not, and means the base's there",
                hint=HINT,
            )
        if mode == "refuse" and len(set(types)) > 1:
            raise InputError(
                f"{name} is stored as {' and '.join(sorted(set(types)))} in different adapters, so its values are not "
                "the same",
                hint=HINT,
            )
        if mode == "first" or len(held) == 1:
            specs.append(TensorSpec(region.tensor, types[0], region.shape))
            units.append(copy_unit(f"saved.{name}", [(held[first], [region])]))
            continue
        shares = _shares(name, [weights[index] for index in held]) if mode == "mean" else None
        specs.append(TensorSpec(region.tensor, widest(types), region.shape))
        writes = blocks_of(region)
        units.append(
            Unit(
                f"saved.{name}",
                "transform",
                reads=tuple(held.values()),
                writes=writes,
                params={"saved": name, "holders": list(held), "shares": shares},
                memory=8 * (len(held) + 3) * max(block.count for block in writes) + (1 << 20),
            )
        )
    return specs, units


def _shares(name: str, weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    if not total:
        raise UsageError(f"--weights of the adapters that hold {name} add up to 0: no mean")
    return [weight / total for weight in weights]


def beside(transform: Transform) -> Transform:
    """A transform of modules that also does the units planned here."""

    @wraps(transform)
    def either(work: Work) -> dict[str, object]:
        return _transform(work) if "saved" in work.params else transform(work)

    return either


def _transform(work: Work) -> dict[str, object]:
    """Copy what all adapters agree on, or write the mean."""
    import torch

    holders, shares = work.params["holders"], work.params["shares"]
    for block in work.unit.writes:
        if shares is None:
            _check_equal(work, block, holders)
            work.copy(placed(block, holders[0]), block)
            continue
        total = torch.zeros(block.shape, dtype=torch.float64)
        for index, share in zip(holders, shares, strict=True):
            total += work.read(placed(block, index)).double() * share
        work.write(block, total)
    return {}


def _check_equal(work: Work, block: Region, holders: Sequence[int]) -> None:
    import torch

    mine = work.read(placed(block, holders[0]))
    for index in holders[1:]:
        if not torch.equal(mine, work.read(placed(block, index))):
            first, other = (work.adapters[i].folder for i in (holders[0], index))
            raise InputError(
                f"{other}: {work.params['saved']}, saved in full, differs from that of {first}, and no rule for "
                "low-rank factors can merge it",
                hint=HINT,
            )
