"""Merge the changes of fine-tunes by their leading singular vectors, made orthogonal across tasks.

TSV-Merge (arXiv:2412.00081). The first source is the base. For every matrix and T fine-tunes, the leading q =
floor(min(m, n) / T) triplets of w_i (theta_i - theta_0) = U_i S_i V_i^T are put side by side and

    theta = theta_0 + scale polar([U_1 ... U_T]) diag(S_1 ... S_T) polar([V_1 ... V_T])^T

with polar(X) = X (X^T X)^(-1/2). Vectors (norms, biases) take the mean of the weighted changes, and so do embedding
and head unless ``--embeddings`` is given, because their rows are tokens rather than directions.

Deviations. Triplets that are zero (below 1e-6 of the largest) are dropped before, and the inverse is taken on the
span of the vectors alone: published code completes both with arbitrary vectors, which multiplies T equal fine-tunes
of low rank by sqrt(T - 1) and spoils orthogonal ones. Here equal fine-tunes give themselves as far as q reaches,
orthogonal ones their sum. Each matrix of an expert is merged for itself, however the file stores it. Decompositions
are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, MethodInfo, option
from . import _merge as common
from . import _spectral as spectral

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="leading singular vectors of changes, made orthogonal across tasks",
    paper="arXiv:2412.00081",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(spectral.SpectralOptions):
    """What the user chooses."""

    rank: int | None = option(
        None, "triplets of each task; by default the smaller side divided by the number of tasks"
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every matrix as base plus the merged change."""
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"--rank {options.rank} should be at least 1")
    return spectral.plan(models, options, {"rank": options.rank})


def transform(work: Work) -> dict[str, object]:
    """Write one tensor, or the matrices of one expert."""
    from ...linalg.task_singular import triplets, tsv_merge

    def merge(changes: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, object]]:
        limit = work.params["rank"] or max(1, min(changes[0].shape) // len(changes))
        parts = [triplets(change, limit) for change in changes]
        total = sum(float(change.square().sum()) for change in changes)
        kept = sum(float(part.values_Q.square().sum()) for part in parts)
        merged = tsv_merge(parts)
        found = changes[0] * 0 if merged is None else merged
        return found, {"energy": kept / total if total else 1.0}

    return spectral.merge(work, merge)
