"""Add up the changes of fine-tunes and make the sum's spectrum flat.

Iso-C (arXiv:2502.04959). The first source is the base. For every matrix, M = sum_i w_i (theta_i - theta_0) = U S
V^T and

    theta = theta_0 + scale mean(S) U V^T

so that no task's strong directions drown the others'. The sum of the singular values stays. Vectors (norms, biases)
take the mean of the weighted changes, and so do embedding and head unless ``--embeddings`` is given, because their
rows are tokens.

Deviations. The mean is over the singular values that are not zero (above 1e-6 of the largest); ``--support full``
takes all min(m, n) of them as published, which on changes of low rank fills directions that no task has. One
fine-tune does not give itself: flattening is the method. Each matrix of an expert is merged for itself.
Decompositions are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..base import Draft, MethodInfo, option
from . import _merge as common
from . import _spectral as spectral

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...execute import Work

INFO = MethodInfo(
    summary="sum of changes with a flat spectrum",
    paper="arXiv:2502.04959",
    inputs=common.BASED,
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(spectral.SpectralOptions):
    """What the user chooses."""

    support: str = option(
        "rank",
        "singular values that share the sum: those not zero, or all",
        choices=("rank", "full"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Every matrix as base plus the flattened sum."""
    return spectral.plan(models, options, {"support": options.support})


def transform(work: Work) -> dict[str, object]:
    """Write one tensor, or the matrices of one expert."""
    from ...linalg.task_singular import isotropic

    def merge(changes: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, object]]:
        total = sum(changes[1:], start=changes[0])
        return isotropic(total, full=work.params["support"] == "full"), {}

    return spectral.merge(work, merge)
