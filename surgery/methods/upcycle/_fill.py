"""Units that methods which grow a mixture share: routers, neutral and whole shared experts, biases at zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import _routers as routers

if TYPE_CHECKING:
    from ...execute import Work


def fill_common(work: Work) -> dict[str, object] | None:
    """Run a unit of `_routers.unit`, `neutral_units` or `whole_shared`; None if it is the method's own."""
    part = work.params["part"]
    if part == "router":
        return routers.fill(work)
    if part == "neutral":
        return _fill_neutral(work)
    if part == "zeros":
        return _fill_zeros(work)
    if part == "double":
        return _double(work)
    return None


def _fill_zeros(work: Work) -> dict[str, object]:
    import torch

    for region in work.unit.writes:
        work.write(region, torch.zeros(region.shape))
    return {}


def _double(work: Work) -> dict[str, object]:
    import torch

    down, switch = work.unit.writes
    work.write(down, 2 * work.read(work.unit.reads[0]))
    work.write(switch, torch.zeros(switch.shape))
    return {}


def _fill_neutral(work: Work) -> dict[str, object]:
    import torch

    gate, up, *rest = work.unit.writes
    for source, target in zip(work.unit.reads, (gate, up), strict=True):
        work.write(target, work.read(source))
    for region in rest:
        work.write(region, torch.zeros(region.shape))
    return {}
