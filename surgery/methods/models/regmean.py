"""Merge every linear layer so that it answers each model's inputs as that model does.

RegMean (arXiv:2212.09849). For the linear layer W_i [out, in] of each model, with the Gram matrix G_i = X_i^T X_i /
N_i of its inputs on text of the model's own kind,

    W = argmin sum_i w_i |X_i (W - W_i)^T|^2 / N_i = (sum_i w_i W_i G_i) (sum_i w_i G_i)^(-1)

Norms, embedding, head and biases are the weighted mean. The matrices are read from one folder for each model, in
the order of the models, that ``moesurg calibrate MODEL --linear-grams --data TEXT`` wrote; that a folder is of its
model is checked by digest.

``--ratio`` scales the off-diagonal elements of G_i, which keeps correlations of a small sample from dominating (the
paper uses 0.1 to 0.9 by model). Deviation: a multiple ``--damping`` of the mean of the diagonal is added to the sum
and pulls towards the mean of the models rather than towards zero, so that directions no input ever takes get the
mean, and equal models give themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...architectures.linears import linears
from ...errors import InputError, UsageError
from ..base import Draft, Exactness, MethodInfo, option, required
from . import _blocks as reading
from . import _merge as common

if TYPE_CHECKING:
    from ...architectures.model import Model
    from ...calibration.gram_folder import Grams
    from ...execute import Work
    from ...weights import Weights

INFO = MethodInfo(
    summary="linear layers that answer each model's inputs as it does",
    paper="arXiv:2212.09849",
    inputs="two or more dense models of one shape, and a folder of Gram matrices of each",
    data="none",
)


@dataclass(frozen=True, kw_only=True)
class Options(common.MergeOptions):
    """What the user chooses."""

    grams: str = required(
        "comma-separated folders of calibrate --linear-grams, one for each model", metavar="DIR,DIR"
    )
    ratio: float = option(0.9, "factor of the off-diagonal elements of every Gram matrix")
    damping: float = option(1e-6, "pull towards the mean, in mean diagonals of the Gram matrices")


def plan(models: Sequence[Model], options: Options) -> Draft:
    """Linear layers by their inputs, everything else by the mean.

    Raises:
        InputError: mixtures, or folders that do not fit.
        UsageError: a number out of range.
    """
    notes = common.check(models, least=2, based=False)
    if models[0].is_moe:
        raise InputError(
            f"{models[0].folder}: is a mixture, whose experts see other inputs in every model",
            hint="regmean takes dense models",
        )
    common.check_share("ratio", options.ratio, zero=True)
    if not 0 < options.damping < float("inf"):
        raise UsageError(f"--damping {options.damping} should be above 0")
    weights = common.shares(common.parse_weights(options.weights, len(models)))
    if min(weights) < 0:
        raise UsageError("--weights of a least-squares merge should not be negative")
    for model, grams in zip(models, _folders(models, options.grams), strict=True):
        grams.check_model(model)
    names = {linear.region.tensor for linear in linears(models[0])}
    return common.plan_merge(
        models,
        {
            "weights": weights,
            "grams": options.grams,
            "ratio": options.ratio,
            "damping": options.damping,
        },
        exactness=Exactness("approximate", "the output answers for several models"),
        notes=notes,
        tensors=len(models) + 8,
        matrices=lambda name: name in names,
    )


def decide_from_weights(
    model: Model, options: Options, statistics: None, weights: Weights, seed: int
) -> dict[str, Any]:
    """Check that every folder is of its model and whole; keeps the digests, so that a resumed run finds them
    unchanged.
    """
    from ...calibration.statistics import model_digest

    found = []
    folders = _folders(weights.sources, options.grams)
    for source, grams in weights.track(list(zip(weights.sources, folders, strict=True))):
        grams.check_model(source, model_digest(source.checkpoint))
        grams.check_files()
        found.append(grams.digest)
    return {str(layer.index): {"grams": found} for layer in model.layers}


def transform(work: Work) -> dict[str, object]:
    """Write one tensor."""
    import torch

    params, weights = work.params, work.params["weights"]
    if not params["matrix"]:
        reading.combine(work, reading.Blocks(work, based=False, once=True), weights)
        return {}
    (target,) = work.unit.writes
    module = next(
        linear.module for linear in linears(work.model) if linear.region.tensor == target.tensor
    )
    stored = [
        work.read(replace(target, source=index)).double() for index in range(len(work.models))
    ]
    mean = sum((m * w for m, w in zip(stored, weights, strict=True)), torch.zeros(()).double())
    total = torch.zeros(target.shape[1], target.shape[1], dtype=torch.float64)
    pull = torch.zeros_like(stored[0])
    folders = _folders(work.models, params["grams"])
    for matrix, weight, grams, digest in zip(
        stored, weights, folders, work.decision["grams"], strict=True
    ):
        if grams.digest != digest:
            raise InputError(f"{grams.folder}: changed since the run began")
        summed, rows = grams.read(work.layer, module)
        gram = summed.double() * (weight / max(1, rows))
        gram = gram * params["ratio"] + torch.diag(gram.diagonal() * (1 - params["ratio"]))
        total += gram
        # The change from the mean is what is solved for: it is small, and zero where all models agree.
        pull += (matrix - mean) @ gram
    damping = params["damping"] * float(total.diagonal().mean())
    if not damping:
        work.write(target, mean)
        return {"moved": 0.0}
    total.diagonal().add_(damping)
    change = torch.cholesky_solve(pull.T, torch.linalg.cholesky(total)).T
    work.write(target, mean + change)
    size = float(mean.norm())
    return {"moved": float(change.norm()) / size if size else 0.0}


def _folders(models: Sequence[Any], text: str) -> list[Grams]:
    """The folders of Gram matrices, one a model.

    Raises:
        UsageError: another number of folders than of models.
        InputError: one of them is none.
    """
    from ...calibration.gram_folder import Grams

    given = [Path(part) for part in text.split(",") if part]
    if len(given) != len(models):
        raise UsageError(
            f"--grams names {len(given)} folders for {len(models)} models",
            hint="one for each model, in their order",
        )
    return [Grams.open(folder) for folder in given]
