"""Rows of the router for experts that are new: taken from others, drawn, or zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import InputError, UsageError
from ...plan import Unit
from .._forms import why_not_padded
from .._mixture import mixture
from .._stored import never

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work


def check_rows(model: Model, std: float, *, barred: bool) -> None:
    """Refuse routers that cannot take further rows.

    Raises:
        UsageError: a standard deviation that is not above 0.
        InputError: groups of experts, or rows to be barred where nothing bars.
    """
    if not std > 0:
        raise UsageError(f"--std should be above 0, is {std}")
    if model.rule.groups > 1:
        raise InputError(
            f"{model.folder}: the router selects within {model.rule.groups} groups of experts, which further ones "
            "would shift"
        )
    reason = why_not_padded(model)
    if barred and reason:
        raise InputError(f"{model.folder}: new experts cannot be barred: {reason}")


def rows_unit(
    layer: Layer,
    output: Experts,
    *,
    kind: str,
    std: float,
    barred: bool,
    taken: Sequence[int] = (),
) -> Unit:
    """Writes what decides the routing of the experts after the original's.

    Args:
        output: the planned mixture, whose router has more rows.
        kind: ``copy``: the rows of ``taken``, and drawn ones after them; ``normal`` or ``zero``.
        std: of drawn rows.
        barred: whether no token shall select them.
        taken: the original's experts that the first new ones are copies of.
    """
    experts = mixture(layer)
    bias = output.correction or output.router_bias
    return Unit(
        f"layer.{layer.index}.rows",
        "transform",
        layer.index,
        reads=tuple(experts.routing),
        writes=tuple(region.rows(experts.count, output.count) for region in output.routing),
        params={
            "part": "rows",
            "rows": kind,
            "taken": list(taken),
            "std": std,
            "barred": bias.tensor if barred and bias is not None else "",
        },
        memory=16 * output.count * experts.hidden,
    )


def write_rows(work: Work) -> dict[str, object]:
    """Run a unit of `rows_unit`."""
    import torch

    kind, taken = work.params["rows"], work.params["taken"]
    for place, (source, target) in enumerate(zip(work.unit.reads, work.unit.writes, strict=True)):
        values = torch.zeros(target.shape)
        if place == 0 and kind != "zero":
            drawn = work.rng("rows", work.layer).standard_normal(target.shape, dtype="float32")
            values = torch.from_numpy(drawn) * work.params["std"]
        if kind == "copy" and taken:
            values[: len(taken)] = work.read(source).float()[taken]
        if target.tensor == work.params["barred"]:
            values.fill_(never(work.model.dtype(source.tensor)))
        work.write(target, values)
    return {}
