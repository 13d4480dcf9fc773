"""Tensors that adapters save in full (``modules_to_save``) in a merge.

They belong to no low-rank rule. One adapter's are copied, and so are those of several adapters that all hold the same
values. Where values differ, or an adapter lacks a tensor and so means the base's, the merge is refused, or

    mean:   sum over the adapters that hold it of w_i t_i / sum of their w_i, rounded once
    first:  that of the first adapter that holds it
    ta:     base + sum of w_i (t_i - base), rounded once; an adapter that lacks it changes nothing (task arithmetic)

as ``--full-tensors`` says. The last reads the base's tensor (``--base``), and is computed as
(1 - sum of w_i) base + sum of w_i t_i, so that a single adapter of weight 1 gives its own tensor. Weights are those of
``--weights``, whatever the method makes of them for low-rank factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING

from ...adapters.output import placed, widest
from ...architectures.model import Model
from ...checkpoint.hub import resolve
from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import InputError, UsageError
from ...plan import Unit, copy_unit
from ..models._merge import blocks_of

if TYPE_CHECKING:
    from ...adapters.adapter import Adapter
    from ...execute import Work
    from ...sources import Source

    Transform = Callable[[Work], dict[str, object]]

MODES = ("refuse", "mean", "first", "ta")
HINT = "--full-tensors mean or first, ta with --base, or take modules_to_save out of the adapters"


def open_base(given: str | None, mode: str) -> Source | None:
    """The base that ``ta`` reads: a folder or a name on the Hub.

    Raises:
        UsageError: ``ta`` without it, or it without ``ta``.
        InputError: it is no model.
    """
    if given is None and mode == "ta":
        raise UsageError("--full-tensors ta adds up changes against the base", hint="--base MODEL")
    if given is None:
        return None
    if mode != "ta":
        raise UsageError(f"--base is read for --full-tensors ta only, which is {mode} here")
    from ...sources import kind_of, open_source

    folder = resolve(given)
    kind = kind_of([folder])
    if kind not in ("models", "custom models"):
        raise InputError(f"--base {folder}: expected a model, found {kind}")
    return open_source(folder)


def plan(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    mode: str,
    base: Source | None = None,
) -> tuple[list[TensorSpec], list[Unit]]:
    """The full tensors of the output and a unit for each.

    Args:
        base: for ``ta``; the source after the adapters.

    Raises:
        InputError: tensors of different shapes, or, with ``refuse``, one that an adapter lacks, or, with ``ta``, one
            that the base lacks.
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
        if mode == "first" or (len(held) == 1 and mode != "ta"):
            specs.append(TensorSpec(region.tensor, types[0], region.shape))
            units.append(copy_unit(f"saved.{name}", [(held[first], [region])]))
            continue
        shares = None
        if mode == "mean":
            shares = _shares(name, [weights[index] for index in held])
        if base is not None:
            shares = [weights[index] for index in held]
            shares.append(1 - math.fsum(shares))
            held[len(adapters)] = placed(_of_base(base, name, region), len(adapters))
        specs.append(TensorSpec(region.tensor, widest(types), region.shape))
        writes = blocks_of(region)
        units.append(
            Unit(
                f"saved.{name}",
                "transform",
                reads=tuple(held.values()),
                writes=writes,
                params={
                    "saved": name,
                    "holders": [[index, other.tensor] for index, other in held.items()],
                    "shares": shares,
                },
                memory=8 * (len(held) + 3) * max(block.count for block in writes) + (1 << 20),
            )
        )
    return specs, units


def _of_base(base: Source, name: str, region: Region) -> Region:
    """The base's tensor, which for a head that is tied and not stored is the embedding.

    Raises:
        InputError: it has none of that name and shape.
    """
    tensors, stored = base.checkpoint.tensors, name
    if isinstance(base, Model) and base.config.tied and name == base.family.head:
        stored = name if name in tensors else base.family.embedding
    if stored not in tensors or tensors[stored].shape != region.shape:
        found = f"is {list(tensors[stored].shape)}" if stored in tensors else "is missing"
        raise InputError(
            f"{base.folder}: {stored}, which adapters save in full as {list(region.shape)}, {found}",
            hint="--base should be the model that the adapters were trained on",
        )
    return Region(stored, region.shape)


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
    """Copy what all adapters agree on, or write a weighted sum."""
    import torch

    holders, shares = work.params["holders"], work.params["shares"]
    for block in work.unit.writes:
        if shares is None:
            _check_equal(work, block, holders)
            work.copy(_part(block, holders[0]), block)
            continue
        total = torch.zeros(block.shape, dtype=torch.float64)
        for holder, share in zip(holders, shares, strict=True):
            total += work.read(_part(block, holder)).double() * share
        work.write(block, total)
    return {}


def _part(block: Region, holder: tuple[int, str]) -> Region:
    """A block of the output in one of its sources, which may call the tensor by another name."""
    source, tensor = holder
    return replace(block, tensor=tensor, source=source)


def _check_equal(work: Work, block: Region, holders: Sequence[tuple[int, str]]) -> None:
    import torch

    mine = work.read(_part(block, holders[0]))
    for holder in holders[1:]:
        if not torch.equal(mine, work.read(_part(block, holder))):
            first, other = (work.adapters[i].folder for i, _ in (holders[0], holder))
            raise InputError(
                f"{other}: {work.params['saved']}, saved in full, differs from that of {first}, and no rule for "
                "low-rank factors can merge it",
                hint=HINT,
            )
