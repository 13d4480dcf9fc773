"""Graft: keep the most salient experts, give them the best neurons of those they inherit tokens from, and solve.

Ours. In every layer, on sampled inputs x of its mixture:

1. The N experts of largest S_j = mean of g_j ||f_j|| over the tokens that select j stay (REAP's score, ``reap``).
   Their rows of the router stay too, so the new coefficients g' are known.
2. A kept expert e inherits a token where the new router selects it and the original one did not: there it stands in
   for the dropped experts that the token had selected.
3. With h_jf(x) the activation that neuron f of expert j gives its down projection, and d_jf its column of that, a
   dropped neuron is worth to e what the tokens that e inherits lose with it; a neuron of e itself is worth what it
   gives to the tokens that had selected e before:

       V_e(j, f)² = ||d_jf||² x sum of (g_j h_jf)²  over x that select j and that e inherits
       V_e(e, f)² = ||d_ef||² x sum of (g_e h_ef)²  over x that select e in the original

   Both are root mean squares of a neuron's output times the root of how many tokens there are, so that neurons for
   many tokens weigh more than those for few.
4. In order, the least worthy neuron of e is replaced by the most worthy dropped one (rows of gate and up, column of
   down) as long as that is worth more, and at most ``--fraction`` of them. Equally worthy: the lower expert and
   neuron. A dropped neuron may go to several experts, since each stands in for it on other tokens.
5. The column of a graft is scaled by the number c with which its output is closest to what is wanted of it alone, over
   all tokens that e is given now: g_j h_jf where e inherits from j, 0 elsewhere. As c g'_e h_jf is what it gives,

       c = sum of g_j g'_e h_jf²  over x that select j and that e inherits  /  sum of (g'_e h_jf)²  over x sent to e

6. The down projections of the layer are solved for together (``merge --reconstruct``, ``_reconstruct.py``), starting
   from and pulled towards these.

``--fraction 0`` is REAP with reconstruction. The size of the output does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..base import Draft, MethodInfo, option
from ..experts._function import hidden
from ..experts._reconstruct import NewExpert, SolveOptions
from ._prune import plan_prune, reconstructed, transform_prune
from ._saliency import PROTECT, PROTECT_HELP, UNSEEN, UNSEEN_HELP, by_score
from .reap import score

if TYPE_CHECKING:
    import torch

    from ...architectures.model import Experts, Model
    from ...execute import Work
    from ._prune import Sampled

INFO = MethodInfo(
    summary="keep the most salient experts, graft neurons of the dropped ones onto them, solve for the layer",
    paper="",
    inputs="one mixture of experts",
    data="routed",
)


@dataclass(frozen=True, kw_only=True)
class Options(SolveOptions):
    """What the user chooses."""

    fraction: float = option(
        0.5, "largest share of a kept expert's neurons that is replaced, from 0 to 1"
    )
    protect: str = option("none", PROTECT_HELP, choices=PROTECT)
    unseen: str = option("prune", UNSEEN_HELP, choices=UNSEEN)


def plan(models: Sequence[Model], options: Options) -> Draft:
    """A checkpoint with ``options.experts`` experts a layer."""
    if not 0 <= options.fraction <= 1:
        raise UsageError(f"--fraction should be from 0 to 1, is {options.fraction:g}")
    return plan_prune(models, options.experts, options, params={"fraction": options.fraction})


decide = by_score(score)


def transform(work: Work) -> dict[str, object]:
    """Graft, solve and write a layer."""
    if work.params["part"] == "layer":
        return reconstructed(work, _graft)
    return transform_prune(work)


def _graft(
    work: Work, experts: Experts, kept: list[int], sampled: Sampled, found: list[NewExpert]
) -> dict[str, object]:
    """Replace neurons of the kept experts in place; returns how many each got, and from how many experts."""
    import torch

    most = int(work.params["fraction"] * experts.width)
    dropped = [expert for expert in range(experts.count) if expert not in kept]
    if not most or not dropped:
        return {"grafted": [0] * len(kept)}
    old_NS = sampled.before_NE[:, kept]
    inherits_NS = (sampled.after_NS > 0) & (old_NS == 0)
    # Worth of every dropped neuron to every kept expert.
    worth_SJF = torch.zeros(len(kept), len(dropped), experts.width, dtype=torch.float64)
    for place, expert in enumerate(dropped):
        gate, up, down = _read(work, experts, expert)
        square_MF, token_M = _squares(sampled, expert, gate, up)
        inherited_SM = inherits_NS[token_M].T.double()
        worth_SJF[:, place] = (inherited_SM @ square_MF) * down.double().square().sum(0)
    chosen: list[list[tuple[int, int, int]]] = []
    for slot, expert in enumerate(kept):
        own = found[slot]
        square_MF, _ = _squares(sampled, expert, own.gate, own.up)
        own_F = square_MF.sum(0) * own.down.double().square().sum(0)
        chosen.append(exchange(own_F, worth_SJF[slot], most))
    for place, expert in enumerate(dropped):
        # Read again rather than held: the dropped experts together may be most of the layer.
        gate, up, down = _read(work, experts, expert)
        for slot, exchanges in enumerate(chosen):
            moves = [(target, neuron) for target, source, neuron in exchanges if source == place]
            if moves:
                targets, neurons = map(list, zip(*moves, strict=True))
                new = found[slot]
                new.gate[targets] = gate[neurons].to(new.gate.dtype)
                new.up[targets] = up[neurons].to(new.up.dtype)
                new.down[:, targets] = down[:, neurons]
    for slot, exchanges in enumerate(chosen):
        if exchanges:
            _scale(sampled, found[slot], slot, inherits_NS[:, slot], exchanges, dropped)
    return {
        "grafted": [len(exchanges) for exchanges in chosen],
        "donors": [len({source for _, source, _ in exchanges}) for exchanges in chosen],
    }


def _scale(
    sampled: Sampled,
    new: NewExpert,
    slot: int,
    inherits_N: torch.Tensor,
    exchanges: Sequence[tuple[int, int, int]],
    dropped: Sequence[int],
) -> None:
    """Scale the grafts' columns to what is wanted of each over all tokens that the expert is given."""
    targets = [target for target, _, _ in exchanges]
    donors = [dropped[place] for _, place, _ in exchanges]
    token_M = sampled.after_NS[:, slot].nonzero().flatten()
    if not len(token_M):
        return
    given_M1 = sampled.after_NS[token_M, slot, None]
    hidden_MN = hidden(sampled.rows_ND[token_M], new.gate[targets], new.up[targets], sampled.act)
    square_MN = hidden_MN.double().square_()
    wanted_MN = sampled.before_NE[token_M][:, donors] * inherits_N[token_M, None]
    wanted_N = (square_MN * wanted_MN * given_M1).sum(0)
    scale_N = wanted_N / (square_MN * given_M1.square()).sum(0).clamp_min(1e-300)
    new.down[:, targets] *= scale_N.float()


def exchange(
    own_F: torch.Tensor, offered_JF: torch.Tensor, most: int
) -> list[tuple[int, int, int]]:
    """Which neurons are replaced by which: (own neuron, donor's place, donor's neuron).

    Args:
        own_F: worth of an expert's neurons.
        offered_JF: worth of the donors' neurons to it.
        most: neurons that are replaced at most.
    """
    import torch

    weakest_F = torch.argsort(own_F, stable=True)[:most]
    flat = offered_JF.flatten()
    strongest = torch.argsort(flat, descending=True, stable=True)[:most]
    width = offered_JF.shape[1]
    found = []
    for target, source in zip(weakest_F.tolist(), strongest.tolist(), strict=False):
        if float(flat[source]) <= float(own_F[target]):
            break
        found.append((target, source // width, source % width))
    return found


def _squares(
    sampled: Sampled, expert: int, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(g h)² of every neuron [M, F] float64 on the tokens [M] that select an expert in the original."""
    gates_N = sampled.before_NE[:, expert]
    token_M = gates_N.nonzero().flatten()
    hidden_MF = hidden(sampled.rows_ND[token_M], gate, up, sampled.act)
    return hidden_MF.double().mul_(gates_N[token_M, None]).square_(), token_M


def _read(
    work: Work, experts: Experts, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate, up, down = (work.read(experts.region(expert, name)) for name in ("gate", "up", "down"))
    return gate, up, down
