"""Routers made from a text for each expert: their rows, and what the texts' tokens would select.

With mu_e the mean input of the layer's feed-forward on the text of expert e, and c that on neutral text or, without
one, the mean of all mu_e:

    d_e = mu_e - c, less its part along c    row_e = d_e / (|d_e| T)

so that what all texts share selects nothing: a token at c has equal logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import InputError, UsageError

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...calibration.means import Means
    from ...execute import Work


def check(temperature: float) -> None:
    """Refuse a temperature that rows cannot be divided by.

    Raises:
        UsageError: it is not a number above 0.
    """
    if not 0 < temperature < float("inf"):
        raise UsageError(f"--temperature should be above 0, is {temperature}")


def router(work: Work) -> tuple[torch.Tensor, dict[str, object]]:
    """The rows of a layer's router, float64 [E, D], and what the report says of them.

    Raises:
        InputError: a text that is not told from the others.
    """
    from ...calibration.means import Means

    statistics, params = Means.open(work.statistics), work.params
    names = statistics.domains
    if params["init"] == "logistic":
        rows_ED, metrics = _fitted(statistics, work.layer, params["l2"])
    else:
        rows_ED = rows(statistics.mean(work.layer), names, neutral=params["neutral"])
        cosine_EE = rows_ED @ rows_ED.T
        cosine_EE.fill_diagonal_(-1)
        metrics = {"largest_cosine": float(cosine_EE.max())}
    return rows_ED / params["temperature"], metrics


def selected(model: Model, statistics: Means, *, neutral: bool) -> dict[str, Any]:
    """What the texts' tokens would select first, by layer, of rows from mean inputs."""
    found = {}
    for layer in model.layers:
        index = layer.index
        rows_ED = rows(statistics.mean(index), statistics.domains, neutral=neutral)
        found[str(index)] = {
            "texts": statistics.domains,
            **_selected(statistics.samples(index), rows_ED),
        }
    return found


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


def _fitted(statistics: Means, layer: int, l2: float) -> tuple[torch.Tensor, dict[str, object]]:
    """A logistic router's rows, how well they tell the texts apart, and what tokens would select."""
    import torch

    from ...linalg.logistic import accuracy, fit, held_out

    samples, count = statistics.samples(layer), len(statistics.domains)
    x_ND = torch.cat(samples)
    label_N = torch.arange(count).repeat_interleave(torch.tensor([len(x) for x in samples]))
    out_N = torch.cat([held_out(numbers_N) for numbers_N in statistics.sequences(layer)])
    partly_ED = fit(x_ND[~out_N], label_N[~out_N], count, l2=l2)
    metrics: dict[str, object] = {
        "accuracy_held_out": round(accuracy(x_ND[out_N], label_N[out_N], partly_ED), 4)
    }
    rows_ED = fit(x_ND, label_N, count, l2=l2)
    metrics["accuracy"] = round(accuracy(x_ND, label_N, rows_ED), 4)
    return rows_ED, {**metrics, **_selected(samples, rows_ED)}


def _selected(samples: Sequence[torch.Tensor], rows_ED: torch.Tensor) -> dict[str, object]:
    """``selected`` [text, expert]: shares of each text's sampled tokens; ``load``: their mean over texts."""
    import torch

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
