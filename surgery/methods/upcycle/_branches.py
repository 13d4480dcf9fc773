"""Several branches of one seed: are they, their feed-forwards as experts of a mixture, and the mean of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...architectures.base import PROJECTIONS
from ...checkpoint.region import Region
from ...errors import InputError
from ...plan import Unit
from ...vocabulary import same_vocabulary
from .._alike import same_settings, same_tensors
from ..base import Draft, Exactness, option
from . import _common as common
from . import _routers as routers
from ._routers import TextRouterOptions

if TYPE_CHECKING:
    from ...architectures.model import Experts, Layer, Model
    from ...execute import Work

BLOCK = 4 << 20
"""Elements that a unit averages."""
PIECE = 1 << 18
"""Elements that it holds at a time: larger ones leave the processor's cache, and what is freed of them stays with the
allocator, so that memory would grow from run to run."""


@dataclass(frozen=True, kw_only=True)
class BranchOptions:
    """What the user chooses of a mixture with one expert from every branch, besides its routers."""

    top_k: int = option(2, "experts each token selects")
    target: str | None = option(
        None, "MoE family to write; by default the one that fits the parents"
    )


def mixed(
    models: Sequence[Model],
    options: TextRouterOptions,
    why: str,
    *,
    top_k: int,
    target: str | None,
    router_std: float = 1.0,
    keep: Callable[[str, int | None], list[Unit]] | None = None,
) -> Draft:
    """The models as one mixture: feed-forwards as experts, with routers as the options say.

    Args:
        why: the reason that the mixture is another function than the first model, where they are not the same files.
        top_k, target: as in :func:`_common.grow`.
        router_std: of routers with random rows.
        keep: as in :func:`_common.draft`.

    Raises:
        InputError: fewer than two models, or models that differ in more than their weights.
        UsageError: counts or an option of the routers out of range.
    """
    count, notes = len(models), check(models)
    common.check_counts(count, top_k, router_std)
    routers.check(options, count, top_k)
    mixture = common.grow(models[0], experts=count, top_k=top_k, target=target)

    def fill(layer: Layer, found: Experts) -> tuple[list[Unit], common.Moves]:
        units = [routers.unit(layer, found, options), *common.neutral_units(mixture, layer)]
        return units, experts(models, layer, found)

    same = common.identical_experts(mixture) if identical(models) else None
    exactness = same or Exactness("approximate", why)
    draft = common.draft(mixture, fill, exactness, keep=keep, notes=notes)
    return routers.asking(draft, options, count)


def check(models: Sequence[Model]) -> list[str]:
    """Refuse models that are not branches of one seed as far as headers, configs and tokenizers tell.

    Returns:
        Sentences on what could not be compared.

    Raises:
        InputError: fewer than two models, or what differs.
    """
    if len(models) < 2:
        raise InputError(f"two or more dense models are mixed, {len(models)} was given")
    notes = []
    for model in models:
        common.dense(model)
        same_settings(models[0], model)
        same_tensors(models[0], model)
        note = same_vocabulary(models[0].folder, model.folder)
        if note is not None:
            notes.append(note)
    return notes


def identical(models: Sequence[Model]) -> bool:
    """Whether all models are the same files. Equal files in two places are not known to be, short of reading them."""
    return len({tuple(file.resolve() for file in model.checkpoint.files) for model in models}) == 1


def experts(models: Sequence[Model], layer: Layer, found: Experts) -> common.Moves:
    """Every model's feed-forward into the expert of its number."""
    return [
        (
            replace(model.layers[layer.index].ffn[projection], source=number),
            [found.region(number, projection)],
        )
        for number, model in enumerate(models)
        for projection in PROJECTIONS
    ]


def averages(whole: Region, sources: int, layer: int | None) -> list[Unit]:
    """Units that write the mean of one tensor, a block of rows each, in pieces."""
    units = []
    for start, block in runs(whole, BLOCK):
        pieces = tuple(piece for _, piece in runs(block, PIECE))
        units.append(
            Unit(
                f"mean.{whole.tensor}.{start}",
                "transform",
                layer,
                reads=tuple(replace(block, source=source) for source in range(sources)),
                writes=pieces,
                params={"part": "mean"},
                memory=48 * max(piece.count for piece in pieces),
            )
        )
    return units


def runs(whole: Region, elements: int) -> Iterator[tuple[int, Region]]:
    """Runs of whole rows of at most so many elements, or of one row, each with the number of its first."""
    rows = whole.shape[0] if whole.shape else 1
    step = max(1, elements * rows // max(1, whole.count))
    if step >= rows:
        yield 0, whole
        return
    for start in range(0, rows, step):
        yield start, whole.rows(start, min(rows, start + step))


def mean(work: Work) -> dict[str, object]:
    """Write one block's mean, summed in float64."""
    import torch

    count, squares, kept = len(work.unit.reads), 0.0, 0.0
    for target in work.unit.writes:
        total = torch.zeros(target.shape, dtype=torch.float64)
        for source in range(count):
            values = work.read(replace(target, source=source)).double()
            total += values
            squares += float(values.square_().sum())
        total /= count
        kept += float(total.square().sum())
        work.write(target, total)
    # How far the sources lie from their mean, relative to their size: 0 for equal ones.
    spread = 1 - count * kept / max(squares, 1e-300)
    return {"relative_variance": max(0.0, spread)} if squares else {}
