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

Experts of mixtures are refused: once routing differs, the two models' inputs of an expert are of different tokens.
Their attention can be compressed: ``--targets attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ..base import Draft, MethodInfo, option, required
from ._lowrank import (
    ALIGN_HELP,
    FORM_HELP,
    FORMS,
    RATIO_HELP,
    TARGETS_HELP,
    choose,
    plan_lowrank,
    write_lowrank,
)

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...calibration.gram_folder import ShiftedGrams
    from ...execute import Work
    from ...plan import Unit

INFO = MethodInfo(
    summary="lower rank that makes up for what earlier layers lost",
    paper="arXiv:2604.02119",
    inputs="one dense model, or a mixture's attention",
    data="shifted",
    tier="custom",
)


@dataclass(frozen=True)
class Options:
    """What the user chooses."""

    ratio: float = required(RATIO_HELP)
    form: str = option("pivot", FORM_HELP, choices=FORMS)
    targets: str = option("all", TARGETS_HELP)
    align: int = option(16, ALIGN_HELP)
    damping: float = option(
        1e-2, "multiple of the mean of the Gram matrix's diagonal that is added to both products"
    )
    share: float = option(
        0.5,
        "how far to go from the outputs on the compressed model's inputs (0) to those on the original ones (1)",
    )


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Uniform ranks for every targeted matrix.

    Raises:
        UsageError: an option out of range.
        InputError: experts are among the targets.
    """
    if not 0 <= options.damping < float("inf"):
        raise UsageError(f"--damping {options.damping} should be at least 0")
    if not 0 <= options.share <= 1:
        raise UsageError(f"--share {options.share} should be between 0 and 1")
    for model in models:
        if any(linear.expert is not None for linear in choose(model, options.targets)):
            raise InputError(
                f"{model.folder}: aa-svd does not compress experts, whose inputs are of other tokens once routing "
                "differs",
                hint="use --targets attention, or svd-llm",
            )
    return plan_lowrank(
        models,
        form=options.form,
        ratio=options.ratio,
        targets=options.targets,
        align=options.align,
        params={"damping": options.damping, "share": options.share},
        memory=96,
    )


def decide(model: Model, options: Options, statistics: ShiftedGrams, seed: int) -> dict[str, Any]:
    """Nothing is decided but that every layer has its matrices; tells how many inputs they sum."""
    from ...calibration.gram_folder import layer_statistics

    return layer_statistics(statistics, model)


def replacement(
    unit: Unit, matrix: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor
) -> torch.Tensor:
    """What a unit's matrix will be, as it is stored."""
    from ...checkpoint.dtypes import torch_dtype
    from ...linalg.whitening import truncate_shifted

    found = truncate_shifted(
        matrix,
        gram,
        cross,
        unit.params["rank"],
        damping=unit.params["damping"],
        share=unit.params["share"],
    )
    return found.product().to(torch_dtype(unit.params["dtype"]))


def transform(work: Work) -> dict[str, object]:
    """Truncate one matrix by the Gram matrices of its inputs."""
    from ...calibration.gram_folder import ShiftedGrams
    from ...linalg.whitening import truncate_shifted

    (region,) = work.unit.reads
    grams, module = ShiftedGrams.open(work.statistics), work.params["input"]
    gram, rows = grams.read(work.layer, module)
    cross, _ = grams.read(work.layer, f"{module}.cross")
    found = truncate_shifted(
        work.read(region),
        gram,
        cross,
        work.params["rank"],
        damping=work.params["damping"],
        share=work.params["share"],
    )
    return {**write_lowrank(work, found), "inputs": rows}
