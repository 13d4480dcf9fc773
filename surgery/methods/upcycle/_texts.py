"""Routers made from a text for each expert: their rows, and what the texts' tokens would select."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError
from ...plan import Unit

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Layer, Model
    from ...calibration.means import Means
    from ...execute import Work


def check(temperature: float) -> None:
    """Refuse a temperature that rows cannot be divided by.

    Raises:
        UsageError: it is not a number above 0.
    """
    if not 0 < temperature < float("inf"):
        raise UsageError(f"--temperature should be above 0, is {temperature}")


def router(layer: Layer, experts: Experts, *, temperature: float, neutral: bool) -> Unit:
    """The unit that makes a layer's router."""
    return Unit(
        f"layer.{layer.index}.router",
        "transform",
        layer.index,
        writes=(experts.router,),
        params={"part": "domains", "temperature": temperature, "neutral": neutral},
        memory=64 * experts.count * experts.hidden,
    )


def fill(work: Work) -> dict[str, object]:
    """Run the unit of `router`.

    Raises:
        InputError: another number of texts than of models.
    """
    from ...calibration.means import Means

    (target,) = work.unit.writes
    statistics = Means.open(work.statistics)
    mean_CD, neutral = statistics.mean(work.layer), work.params["neutral"]
    if len(mean_CD) - neutral != target.shape[0]:
        raise InputError(
            f"{len(mean_CD)} texts for {target.shape[0]} models"
            + (" and --neutral" if neutral else ""),
            hint="give --data once for every model, in their order",
        )
    rows_ED = rows(mean_CD, statistics.domains, neutral=neutral)
    work.write(target, rows_ED / work.params["temperature"])
    cosine_EE = rows_ED @ rows_ED.T
    cosine_EE.fill_diagonal_(-1)
    return {"largest_cosine": float(cosine_EE.max())}


def selected(model: Model, statistics: Means, *, neutral: bool) -> dict[str, Any]:
    """What the texts' tokens would select first, by layer."""
    return {
        str(layer.index): {
            "texts": statistics.domains,
            **_selected(statistics, layer.index, neutral=neutral),
        }
        for layer in model.layers
    }


def rows(mean_CD: torch.Tensor, names: Sequence[str], *, neutral: bool) -> torch.Tensor:
    """The router's rows of length one, float64 [E, D], from mean inputs [C, D] of C = E texts, or E + 1.

    Args:
        mean_CD: float64.
        names: of the texts.
        neutral: the last text belongs to no expert and is the centre.

    Raises:
        InputError: a text whose mean is that of the neutral text.
    """
    import torch

    neutral_D = mean_CD[-1] if neutral else mean_CD.mean(dim=0)
    change_ED = (mean_CD[:-1] if neutral else mean_CD) - neutral_D
    size = torch.linalg.vector_norm(neutral_D)
    along_D = neutral_D / size if float(size) else neutral_D
    change_ED = change_ED - (change_ED @ along_D)[:, None] * along_D
    length_E = torch.linalg.vector_norm(change_ED, dim=1)
    short = torch.nonzero(length_E <= 1e-9 * size)
    if len(short):
        raise InputError(
            f"the text {names[int(short[0])]} is not told from the neutral one by its mean",
            hint="choose texts that differ",
        )
    found_ED: torch.Tensor = change_ED / length_E[:, None]
    return found_ED


def _selected(statistics: Means, layer: int, *, neutral: bool) -> dict[str, object]:
    import torch

    samples = statistics.samples(layer)
    rows_ED = rows(statistics.mean(layer), statistics.domains, neutral=neutral)
    experts = len(rows_ED)
    counts_CE = torch.stack(
        [
            torch.bincount((x_ND.double() @ rows_ED.T).argmax(-1), minlength=experts)
            for x_ND in samples
        ]
    ).double()
    shares_CE = counts_CE / counts_CE.sum(dim=1, keepdim=True)
    return {
        "selected": [[round(share, 4) for share in row] for row in shares_CE.tolist()],
        "load": [round(share, 4) for share in shares_CE.mean(dim=0).tolist()],
    }
