"""What the weights of adapters tell: how large each change is, how many ranks it really uses, and which are alike.

A module's change is scale * B A. It is never formed: norms, singular values and inner products come from the factors
(`linalg/factor_stack.py`), read one module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .adapters.adapter import Adapter, Module
from .adapters.output import aligned, check_agreement, layout_of, placed, read_factors
from .inspection_adapter import totals
from .progress import Progress, Stop
from .weights import Weights


def measure(
    records: Sequence[dict[str, Any]],
    adapters: Sequence[Adapter],
    layout: str | None,
    progress: Progress,
) -> dict[str, Any] | None:
    """Measure adapters module by module, and add what is found to their records.

    Every row of ``per_module`` gets ``norm`` (Frobenius, of scale * B A, all experts together), ``effective_rank``
    (exp of the entropy of the singular values' shares; the mean over experts), ``dead_ranks`` (those whose part of
    the product is at most 1e-12 of the largest) and, with ``lora_bias``, ``bias_norm`` (of scale * bias). A record
    gets ``weights``, their totals.

    Args:
        records: of `inspect_adapter`, in the order of the adapters.
        adapters: of one base, if several.
        layout: of stacked experts' second factors.
        progress: told of every module.

    Returns:
        Of several adapters ``folders``, ``cosines`` [T, T] of the angles between their changes as a whole (modules
        that only one has count as zero in the other) and ``per_module`` of those that two or more have: ``module``,
        ``folders`` and ``cosines``. None of one.

    Raises:
        InputError: adapters of different bases or shapes, a layout that cannot be told, or a value that is not finite.
    """
    check_agreement(adapters)
    layouts = [layout_of(adapter, layout) for adapter in adapters]
    rows = [{row["module"]: row for row in record["per_module"]} for record in records]
    modules = aligned(adapters)
    inner = [[0.0] * len(adapters) for _ in adapters]
    pairs: list[dict[str, Any]] = []
    with Weights(adapters, progress, Stop()) as weights:
        progress.stage("measuring", len(modules))
        for name, row in modules.items():
            held = [(index, module) for index, module in enumerate(row) if module is not None]
            found = [_one(weights, rows[i][name], m, i, layouts[i]) for i, m in held]
            for (index, _), (_, norm) in zip(held, found, strict=True):
                inner[index][index] += norm**2
            if len(held) > 1:
                angles = _angles([factors for factors, _ in found])
                for i, (first, _) in enumerate(held):
                    for j, (second, _) in enumerate(held):
                        if i != j:
                            inner[first][second] += angles[i][j] * found[i][1] * found[j][1]
                places = [index for index, _ in held]
                pairs.append({"module": name, "folders": places, "cosines": angles})
            progress.advance()
    for record in records:
        record["weights"] = totals(record["per_module"])
    if len(adapters) < 2:
        return None
    return {
        "folders": [str(adapter.folder) for adapter in adapters],
        "cosines": _cosines(inner),
        "per_module": pairs,
    }


def _one(
    weights: Weights, row: dict[str, Any], module: Module, source: int, layout: str
) -> tuple[Any, float]:
    """Measure a module of one adapter into its row; gives its factors [E, r, n], [E, m, r] and its norm."""
    from .linalg.factor_stack import Stack

    factors = read_factors(weights, module, source=source, layout=layout, balanced=False)
    stack = Stack([factors], [1.0])
    row["norm"] = stack.norm
    row["effective_rank"] = stack.effective_rank()
    row["dead_ranks"] = stack.dead()
    if module.bias is not None:
        bias = weights.read(placed(module.bias, source)).double() * module.scale
        row["bias_norm"] = float(bias.norm())
    return factors, stack.norm


def _angles(several: Sequence[Any]) -> list[list[float]]:
    from .linalg.factor_stack import Stack

    found = Stack(several, [1.0] * len(several)).cosines()
    # Rounding takes a cosine out of its range by an ulp or two.
    return [[max(-1.0, min(1.0, value)) for value in row] for row in found]


def _cosines(inner: Sequence[Sequence[float]]) -> list[list[float]]:
    """Cosines from inner products; 0 where a change is zero."""
    sizes = [math.sqrt(inner[index][index]) for index in range(len(inner))]
    return [
        [
            max(-1.0, min(1.0, inner[i][j] / (sizes[i] * sizes[j]))) if sizes[i] * sizes[j] else 0.0
            for j in range(len(inner))
        ]
        for i in range(len(inner))
    ]
