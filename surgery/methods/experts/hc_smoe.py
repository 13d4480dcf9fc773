"""HC-SMoE: hierarchical clustering of experts by their mean outputs, then a frequency-weighted average.

Retraining-Free Merging of Sparse MoE via Hierarchical Clustering (arXiv:2410.08589):

1. a_i = mean over all calibration tokens of f_i(x): every expert on every token, whatever the router says.
2. Agglomerative clustering of the a_i with Euclidean distances, average linkage by default, until N clusters are
   left; the same N in every layer. All linkages merge the nearest clusters. (The published code's complete linkage
   merges the farthest, and its Ward distance is not squared; SciPy's linkage is used here.)
3. E_c = sum of A_i E_i / sum of A_i over the cluster, A the activation counts. A cluster that no token used is
   averaged uniformly. (The published code divides zero by a small number and writes an expert of zeros.)

``--basis`` clusters by something else: ``logits`` (columns of raw router logits over all tokens), ``rows`` (the
router's rows) or ``weights`` (all weights of an expert, flattened as they lie); statistics are all-expert in every
case. Neurons are not aligned, as in the paper; ``--align weight`` matches them to those of the cluster's most used
member before averaging.

The paper leaves the router as it is and points several rows at one expert: that is ``--router tied``. The default,
``keep``, writes the row of each cluster's most used member and a folder that is really smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.reader import TensorReader
from ...errors import InputError
from .._mixture import mixture
from ..base import Draft, MethodInfo, option
from ._compare import compare
from ._groups import from_labels
from ._merge import ROUTER_HELP, ROUTERS, plan_merge
from ._merge_unit import transform_merge
from ._reconstruct import ReconstructOptions, reconstruct_params

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.statistics import Statistics

INFO = MethodInfo(
    summary="hierarchical clustering of mean expert outputs, then a frequency-weighted average",
    paper="arXiv:2410.08589",
    inputs="one mixture of experts",
    data="all-expert",
)
BASES = {
    "output": "mean-outputs",
    "logits": "router-logits",
    "rows": "router-rows",
    "weights": "weights",
}


@dataclass(frozen=True, kw_only=True)
class Options(ReconstructOptions):
    """What the user chooses."""

    router: str = option("keep", ROUTER_HELP, choices=ROUTERS)
    linkage: str = option(
        "average",
        "which distance of two clusters counts",
        choices=("average", "complete", "single", "ward"),
    )
    basis: str = option(
        "output",
        "what experts are compared by: mean output over all tokens, router logits, router rows, or weights",
        choices=tuple(BASES),
    )
    align: str = option(
        "none",
        "permute neurons to match the most used member's before averaging",
        choices=("none", "weight"),
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer."""
    params = {"router": options.router, "align": options.align, "reference": "representative"}
    return plan_merge(
        models,
        options,
        router=options.router,
        params={**params, **reconstruct_params(options)},
        sample=options.sample if options.reconstruct else 0,
    )


def decide(model: Model, options: Options, statistics: Statistics, seed: int) -> dict[str, Any]:
    """Clusters of every layer. Uses no randomness."""
    from ...linalg.agglomeration import agglomerate

    decided = {}
    with TensorReader(model.checkpoint) as reader:
        for layer in model.moe_layers:
            found = statistics.layer(layer.index)
            if not found.tokens:
                raise InputError(
                    f"layer {layer.index}: the statistics saw no token; calibrate on some text"
                )
            compared = compare(reader, mixture(layer), found, BASES[options.basis])
            labels = agglomerate(compared.points_ED, options.experts, options.linkage)
            usage = [float(count) for count in found.count_E]
            decided[str(layer.index)] = from_labels(labels, usage).to_json()
    return decided


transform = transform_merge
