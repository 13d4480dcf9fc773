"""The router of Read-ME in closed form: evidence of every token of the vocabulary for every expert.

With e(x) the input embedding of token x and lambda = 2^(-1 / h), the features of token t of a sequence are

    p_t = sum_{s <= t} lambda^(t - s) e(x_s) / sum_{s <= t} lambda^(t - s)

and logistic regression of the text that t is from gives rows V [C, D]. Multiplied by the denominator, which changes no
order, V p_t is the decayed sum of V e(x_s): the evidence that is stored. Features are products of a sparse matrix
[N, V] with blocks of the embedding, of which no more than one is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...checkpoint.layout import TensorSpec
from ...checkpoint.region import Region
from ...errors import UsageError
from ...plan import Unit

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Model
    from ...calibration.means import Means
    from ...execute import Work

HALF_LIVES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""Tokens after which evidence counts half; the stored number is exact in every type."""
FORGOTTEN = 1e-9
"""Evidence that counts less than this is left out of the fit."""
BLOCK = 4 << 20
"""Elements of the embedding that are read at a time."""


def check(half_life: int | None, l2: float, sample: int) -> None:
    """Refuse options that no router has.

    Raises:
        UsageError: one is out of range.
    """
    if half_life is not None and (half_life < 0 or half_life & (half_life - 1)):
        raise UsageError(
            f"--half-life {half_life} should be a power of two, or 0",
            hint="such numbers are exact in every type that weights can be loaded in",
        )
    if not l2 > 0:
        raise UsageError(
            "--router-l2 should be above 0: texts that differ have no finite fit without"
        )
    if sample < 10:
        raise UsageError(f"--router-sample should be at least 10, is {sample}")


def unit(
    model: Model, place: str, experts: int, *, half_life: int | None, l2: float, sample: int
) -> tuple[Unit, list[TensorSpec]]:
    """The unit that makes the router, and its tensors below ``place``."""
    whole = model.whole(model.family.embedding)
    vocab, hidden = whole.shape
    step = max(1, BLOCK // hidden)
    writes = (Region(f"{place}.evidence", (vocab, experts)), Region(f"{place}.half_life", (1,)))
    made = Unit(
        "router",
        "transform",
        None,
        reads=tuple(whole.rows(start, min(vocab, start + step)) for start in range(0, vocab, step)),
        writes=writes,
        params={"part": "router", "half_life": half_life, "l2": l2},
        # Features twice and the fit's copy in float64, a block of the embedding, and the table.
        memory=24 * experts * sample * hidden + 16 * BLOCK + 8 * vocab * experts,
    )
    return made, [TensorSpec(region.tensor, "F32", region.shape) for region in writes]


@dataclass(frozen=True)
class Tokens:
    """The tokens that the router is fitted to.

    Attributes:
        sequences: token ids of each sequence.
        sequence, position: of every token: the sequence it is in, and its place there.
        label: the text it is from, int64 [N].
        out: whether it judges the fit instead of taking part in it, bool [N].
    """

    sequences: Sequence[torch.Tensor]
    sequence: Sequence[int]
    position: Sequence[int]
    label: torch.Tensor
    out: torch.Tensor


def fill(work: Work, statistics: Means) -> dict[str, object]:
    """Choose a half-life, fit the rows and write the evidence of every token."""
    import torch

    from ...linalg.logistic import accuracy, fit

    table, half_life_1 = work.unit.writes
    experts, l2, given = table.shape[1], work.params["l2"], work.params["half_life"]
    tokens = _sampled(statistics)
    tried: dict[str, float] = {}
    best, best_ND = -1, None
    for half_life in HALF_LIVES if given is None else (given,):
        x_ND = _features(work, tokens, half_life)
        kept_N = ~tokens.out
        rows_CD = fit(x_ND[kept_N], tokens.label[kept_N], experts, l2=l2)
        found = accuracy(x_ND[tokens.out], tokens.label[tokens.out], rows_CD)
        if best_ND is None or found > tried[str(best)]:
            best, best_ND = half_life, x_ND
        tried[str(half_life)] = found
    if best_ND is None:
        raise UsageError("no half-life was tried")
    rows_CD = fit(best_ND, tokens.label, experts, l2=l2)
    evidence_VC = torch.cat([work.read(block).double() @ rows_CD.T for block in work.unit.reads])
    work.write(table, evidence_VC)
    work.write(half_life_1, torch.tensor([float(best)]))
    choice_N = (best_ND @ rows_CD.T).argmax(dim=-1)
    shares_CE = torch.zeros(experts, experts, dtype=torch.float64)
    shares_CE.index_put_((tokens.label, choice_N), torch.ones(len(choice_N)).double(), True)
    shares_CE /= shares_CE.sum(dim=1, keepdim=True)
    return {
        "untrained": True,
        "half_life": best,
        "accuracy": round(accuracy(best_ND, tokens.label, rows_CD), 4),
        "accuracy_held_out": {name: round(found, 4) for name, found in tried.items()},
        "selected": [[round(share, 4) for share in row] for row in shares_CE.tolist()],
        "load": [round(share, 4) for share in shares_CE.mean(dim=0).tolist()],
    }


def _sampled(statistics: Means) -> Tokens:
    """Evenly spread tokens of every text, as many as of the layers' inputs are sampled."""
    import torch

    from ...linalg.logistic import held_out

    texts = statistics.text()
    counts = [len(x) for x in statistics.samples(0)]
    sequences: list[torch.Tensor] = []
    owner: list[int] = []
    position: list[int] = []
    labels, outs = [], []
    for label, (text, count) in enumerate(zip(texts, counts, strict=True)):
        length_S = torch.tensor([len(ids) for ids in text])
        total = int(length_S.sum())
        chosen_N = torch.arange(count) * total // count
        end_S = length_S.cumsum(0)
        number_N = torch.searchsorted(end_S, chosen_N, right=True)
        position += (chosen_N - (end_S - length_S)[number_N]).tolist()
        owner += (number_N + len(sequences)).tolist()
        labels.append(torch.full((count,), label))
        outs.append(held_out(number_N))
        sequences += text
    return Tokens(sequences, owner, position, torch.cat(labels), torch.cat(outs))


def _features(work: Work, tokens: Tokens, half_life: int) -> torch.Tensor:
    """The decayed means of the embeddings up to every token: float64 [N, D]."""
    import math

    import numpy as np
    import torch
    from scipy.sparse import csc_array

    from ...modeling.moesurg_read_me import decay

    factor = decay(half_life)
    reach = 1 + (math.ceil(math.log(FORGOTTEN) / math.log(factor)) if factor else 0)
    places, columns, weights = [], [], []
    for row, (owner, position) in enumerate(zip(tokens.sequence, tokens.position, strict=True)):
        first = max(0, position + 1 - reach)
        ids = tokens.sequences[owner][first : position + 1].numpy()
        weight = factor ** np.arange(len(ids) - 1, -1, -1.0)
        places.append(np.full(len(ids), row))
        columns.append(ids)
        weights.append(weight / weight.sum())
    vocab = work.unit.writes[0].shape[0]
    share: Any = csc_array(
        (np.concatenate(weights), (np.concatenate(places), np.concatenate(columns))),
        shape=(len(tokens.sequence), vocab),
    )
    found: Any = 0.0
    start = 0
    for block in work.unit.reads:
        stop = start + block.shape[0]
        found = found + share[:, start:stop] @ work.read(block).double().numpy()
        start = stop
    x_ND: torch.Tensor = torch.from_numpy(np.asarray(found))
    return x_ND
