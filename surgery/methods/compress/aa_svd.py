"""AA-SVD: lower rank that gives the original outputs from the compressed model's own inputs.

For inputs X of a linear layer in the original model and Y in the model whose layers before it are compressed,

    W' = the matrix of rank R that minimises ||X W^T - Y W'^T||_F,

which is the truncation of W X^T Y (Y^T Y)^-1 in the norm of Y^T Y (arXiv:2604.02119). With Y = X it is ``svd-llm``.
What earlier truncations did to the inputs is made good as far as a matrix of the rank can.

The closed form is exact as stated, not an approximation by a second calibration: the text runs through the original and
the growing compressed model side by side, and each matrix is made before the inputs of the next are looked at, within a
layer too (query, key and value; output; gate and up; down). That takes four passes over the text for a layer, which
stop where inputs are seen. X^T Y and Y^T Y are kept with the run, and units make the matrices from them again.

Deviations. A regression on thousands of inputs learns the text by heart: as published, the error after three layers of
a small model fell from 8.1 % (``svd-llm``) to 5.1 % on the 6,144 tokens of calibration and rose from 10.1 % to 10.8 %
on others, and perplexity was worse too. So ``--share`` asks for outputs on share X + (1 - share) Y instead of X, and
``--damping`` adds a multiple of the mean diagonal of Y^T Y to both products, which holds W' to W where the text says
little; ``--share 1 --damping 1e-4`` is the paper's. Its refinement of whole blocks by gradient descent is left out.

Ranks have to be known before the text is seen: they are uniform, given (``--rank-plan``, such as that of a run of
``svd-llm --allocate``), or allocated by the spectra of the weights alone.

Experts of mixtures, of which the paper does not speak: once matrices are replaced, the two models' routers differ, so
every token's experts are taken to be those that the original router selects, in both models. Gate and up use all inputs
of the mixture, down the expert's own hidden activations; an expert that no token selects gets the plain truncation.
The routers themselves stay, and the compressed model's own choices make the inputs of the next layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...architectures.base import PROJECTIONS
from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option
from ._lowrank import choose, write_lowrank
from ._options import check_damping
from ._ranked import RankOptions, decided_ranks, own_spectrum, plan_ranked

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...calibration.gram_folder import ShiftedGrams
    from ...execute import Work
    from ...linalg.lowrank import LowRank
    from ...plan import Unit
    from ...weights import Weights

INFO = MethodInfo(
    summary="lower rank that makes up for what earlier layers lost",
    paper="arXiv:2604.02119",
    inputs="one dense model or mixture",
    data="shifted",
    tier="custom",
)


@dataclass(frozen=True)
class Options(RankOptions):
    """What the user chooses."""

    damping: float = option(
        1e-2, "multiple of the mean of the Gram matrix's diagonal that is added to both products"
    )
    share: float = option(
        0.5,
        "how far to go from the outputs on the compressed model's inputs (0) to those on the original ones (1)",
    )


def plan(
    models: Sequence[Model], options: Options, decisions: Mapping[str, Any] | None = None
) -> Draft:
    """Every targeted matrix at its rank.

    Raises:
        UsageError: an option out of range.
        InputError: experts are among the targets that are no three matrices called by index.
    """
    check_damping(options.damping)
    if not 0 <= options.share <= 1:
        raise UsageError(f"--share {options.share} should be between 0 and 1")
    for model in models:
        if any(linear.expert is not None for linear in choose(model, options.targets)):
            experts = model.moe_layers[0].experts
            if (
                experts is None
                or experts.layout.parts != PROJECTIONS
                or experts.stock.call != "routed"
            ):
                raise InputError(
                    f"{model.folder}: aa-svd compresses experts that are three matrices without biases, called by "
                    f"index; those of {model.family.model_type} are not",
                    hint="use --targets attention, or svd-llm --form dense",
                )
    params = {"damping": options.damping, "share": options.share}
    return plan_ranked(models, options, params, decisions, memory=96)


def draft_from_weights(models: Sequence[Model], options: Options, weights: Weights) -> Draft | None:
    """The output at ranks by the matrices' own singular values, where they are not uniform."""
    found = decided_ranks(models[0], options, weights, own_spectrum)
    return None if found is None else plan(models, options, found)


def decide(model: Model, options: Options, statistics: ShiftedGrams, seed: int) -> dict[str, Any]:
    """Nothing is decided but that every layer has its matrices; tells how many inputs they sum."""
    from ...calibration.gram_folder import layer_statistics

    return layer_statistics(statistics, model)


def replacement(
    unit: Unit, matrix: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """What a unit's matrix will be, as it is stored."""
    from ...checkpoint.dtypes import torch_dtype

    found = _truncated(unit.params, matrix, gram, cross)
    return found.product().to(torch_dtype(unit.params["dtype"]))


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix by the Gram matrices of its inputs."""
    from ...calibration.gram_folder import ShiftedGrams

    (region,) = work.unit.reads
    grams, module = ShiftedGrams.open(work.statistics), work.params["input"]
    gram, rows = grams.read(work.layer, module)
    cross, _ = grams.read(work.layer, f"{module}.cross")
    found = _truncated(work.params, work.read(region), gram, cross)
    return {**write_lowrank(work, found), "inputs": rows}


def _truncated(
    params: Mapping[str, Any], matrix: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor
) -> LowRank:
    from ...linalg.lowrank import truncate
    from ...linalg.whitening import truncate_shifted

    if not bool(gram.any()):
        return truncate(matrix, params["rank"])
    return truncate_shifted(
        matrix, gram, cross, params["rank"], damping=params["damping"], share=params["share"]
    )
