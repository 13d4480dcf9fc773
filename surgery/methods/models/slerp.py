"""Spherical linear interpolation of two models, tensor by tensor.

    theta = sin((1 - t) a) / sin(a) theta_1 + sin(t a) / sin(a) theta_2
    cos(a) = <theta_1, theta_2> / (|theta_1| |theta_2|)

Shoemake (SIGGRAPH 1985), on each tensor flattened to a vector. The tensors keep their lengths, as in mergekit; only
the angle is that of their directions. Tensors whose cosine is beyond 0.9995 in size, and zeros, are interpolated
linearly. Inner products are summed in float64. Two equal models give themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import InputError
from ..base import Draft, Exactness, MethodInfo, option
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="spherical interpolation of two models",
    paper="",
    inputs="two models of one shape",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user chooses."""

    t: float = option(0.5, "0 gives the first model, 1 the second")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every tensor on the arc between the two models."""
    notes = common.check(models, least=2, based=False)
    if len(models) != 2:
        raise InputError(
            f"slerp lies between two models, {len(models)} were given",
            hint="--method karcher generalises it to several",
        )
    common.check_share("t", options.t, zero=True)
    return common.plan_merge(
        models,
        {"t": options.t},
        exactness=Exactness("approximate", "the output lies between two models"),
        notes=notes,
    )


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    from ...linalg.merge_rules import normalised, slerp_coefficients

    blocks = reading.Blocks(work, based=False)
    products = reading.gram(blocks)
    reading.combine(work, blocks, slerp_coefficients(products, work.params["t"]))
    return {"cosine": float(normalised(products)[0, 1])}
