"""Rules that merge changes of weights element by element: tensors in, a tensor out, nothing of models or files.

A change is a fine-tuned tensor minus its base, or any other set of tensors of one shape, such as the cores of
low-rank adapters. Rules keep the type they are given. Trimming is by `selection`, so that a tensor may come in
blocks; what a rule has to know of the whole tensor is an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_i w_i t_i; a weight of 0 leaves its tensor out.

    Args:
        tensors: of one shape and type.
        weights: one each.
    """
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total.add_(tensor, alpha=weight)
    return total


PIECE = 1 << 15
"""Elements of a piece."""


@dataclass(frozen=True)
class Elected:
    """A merge by elected signs.

    Attributes:
        merged: the result.
        conflicts: elements where sources that are not zero have both signs.
    """

    merged: torch.Tensor
    conflicts: int


def elected(
    changes: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool = True
) -> Elected:
    """Elect a sign for every element and merge what agrees with it (TIES-Merging, arXiv:2306.01708).

        s = sign(sum_i w_i d_i),   d = sum_{i: sign(w_i d_i) = s} w_i d_i  /  sum_{i: ...} |w_i|

    A sum of exactly zero elects plus. (The reference takes the sign of the majority of all elements instead;
    mergekit and PEFT take plus. Both signs lose as much of the total, so it matters for two equal and opposite
    changes only.)

    Args:
        changes: trimmed, of one shape and type; zeros abstain.
        weights: one each, any sign.
        normalize: whether to divide by the weights that agree; without, the sum stays.
    """
    merged = torch.empty_like(changes[0], memory_format=torch.contiguous_format)
    conflicts = 0
    # Pieces that fit the processor's cache: every step below is one pass over them.
    pieces = [_pieces(change) for change in changes]
    for target, *piece in zip(_pieces(merged), *pieces, strict=True):
        conflicts += _elect(target, piece, weights, normalize)
    return Elected(merged, conflicts)


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Runs of PIECE elements, views of a contiguous tensor."""
    flat = tensor.reshape(-1)
    return [flat[start : start + PIECE] for start in range(0, flat.numel(), PIECE)]


def _elect(
    target: torch.Tensor,
    changes: Sequence[torch.Tensor],
    weights: Sequence[float],
    normalize: bool,
) -> int:
    """Write one piece of `elected`; returns its conflicts.

    All in floating arithmetic on a piece: comparisons and selections take up to a hundred times as long.
    """
    total = weighted_sum(changes, weights)
    # The sign, and plus for zero.
    sign = total.sign_().add_(0.5).sign_()
    merged, mass, lowest = (torch.zeros_like(sign) for _ in range(3))
    for change, weight in zip(changes, weights, strict=True):
        if not weight:
            continue
        # The change in the direction of the elected sign; what points the other way is cut off at zero.
        along = (change * sign).mul_(weight)
        torch.minimum(lowest, along, out=lowest)
        along.clamp_(min=0)
        merged.add_(along)
        if normalize:
            mass.add_(along.sign_(), alpha=abs(weight))
    opposed = lowest.sign_().mul_(torch.sign(merged)).sum(dtype=torch.float64)
    if normalize:
        # Where nothing agrees there is nothing to divide, and the smallest weight does as well as any.
        merged.div_(mass.clamp_(min=min((abs(w) for w in weights if w), default=1.0)))
    torch.mul(merged, sign, out=target)
    return int(-opposed)


def drawn(uniform: torch.Tensor, likely: torch.Tensor | float) -> torch.Tensor:
    """1 where a uniform number is below its probability, else 0, in place of the numbers and of their type.

    In floating arithmetic, which is many times faster than comparing and selecting.
    """
    return uniform.neg_().add_(likely).sign_().clamp_(min=0)


def keep_probabilities(change: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """How likely each element is kept: larger ones more, by their rank in the row (DELLA, arXiv:2406.11617).

        p = density + window (rank / (n - 1) - 1/2),   rank 0 for the smallest of a row's n magnitudes, ties by position

    Args:
        change: [..., n]; a row of one element is kept with ``density``.
        density: mean of the probabilities.
        window: distance of the largest from the smallest probability.

    Returns:
        float32 or float64 like ``change``.
    """
    rows = change.reshape(-1, change.shape[-1]) if change.dim() else change.reshape(1, 1)
    length = rows.shape[1]
    if length == 1:
        return torch.full_like(change, density)
    order = rows.abs().argsort(dim=1, stable=True)
    ramp = torch.linspace(-0.5, 0.5, length, dtype=change.dtype).expand_as(rows)
    found = torch.empty_like(rows).scatter_(1, order, ramp)
    return found.mul_(window).add_(density).reshape(change.shape)


def sce_weights(energies: Sequence[float]) -> list[float]:
    """Each model's share of the squared selected changes; equal shares where nothing is selected."""
    total = sum(energies)
    if not total:
        return [1 / len(energies)] * len(energies)
    return [energy / total for energy in energies]


# Rules that see whole tensors only through their inner products. G_ij = <t_i, t_j> in float64 is all they need, and the
# result is a combination of the tensors.


def slerp_coefficients(gram_TT: torch.Tensor, t: float) -> list[float]:
    """Spherical interpolation of two tensors, flattened.

        sin((1 - t) a) / sin a,   sin(t a) / sin a,   cos a = <t_0, t_1> / (|t_0| |t_1|)

    Nearly parallel tensors (|cos a| > 0.9995) and zeros are interpolated linearly.

    Args:
        gram_TT: [2, 2] float64.
        t: 0 gives the first, 1 the second.
    """
    norms = gram_TT.diagonal().sqrt()
    scale = float(norms[0] * norms[1])
    cosine = float(gram_TT[0, 1]) / scale if scale else 1.0
    if abs(cosine) > PARALLEL:
        return [1 - t, t]
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    both = torch.stack([(1 - t) * angle, t * angle]).sin() / angle.sin()
    return [float(value) for value in both]


PARALLEL = 0.9995
"""Cosine beyond which the angle of two tensors is too small to divide by."""


def stock_ratio(gram_TT: torch.Tensor) -> float:
    """How far to go from the base to the mean of N fine-tunes (Model Stock, arXiv:2403.19522).

        t = N c / (1 + (N - 1) c),   c the mean cosine of two changes

    Changes that point away from each other on the average (c < 0) give 0, the base.

    Args:
        gram_TT: of the changes, [N, N] float64, N at least 2. A change of zero has the cosine 0 with all.
    """
    count = len(gram_TT)
    unit = normalised(gram_TT)
    cosine = float(unit.sum() - unit.diagonal().sum()) / (count * (count - 1))
    cosine = min(1.0, max(0.0, cosine))
    return count * cosine / (1 + (count - 1) * cosine)


def karcher_coefficients(
    gram_TT: torch.Tensor, weights: Sequence[float], *, steps: int = 100, tolerance: float = 1e-12
) -> list[float]:
    """The Riemannian centre of mass of the tensors' directions, with the weighted mean of their lengths.

    On the sphere the centre lies in the span of the points, so the iteration mu <- exp_mu(sum_i w_i log_mu(u_i))
    runs on coefficients. It starts from the normalised mean.

    Args:
        gram_TT: [T, T] float64.
        weights: not negative, with the sum 1.
        steps: iterations at most.
        tolerance: length of a step that ends it, radians.

    Returns:
        Coefficients of the tensors; zeros where the mean has no direction, as for two opposite tensors.
    """
    norms = gram_TT.diagonal().sqrt()
    length = float(norms @ torch.tensor(weights, dtype=torch.float64))
    share = torch.tensor(weights, dtype=torch.float64) * (norms > 0)
    unit_TT = normalised(gram_TT)
    centre = _unit(share, unit_TT)
    for _ in range(steps):
        cosines = (unit_TT @ centre).clamp(-1, 1)
        angles = cosines.acos()
        # The logarithm is (u - cos a mu) a / sin a; a / sin a is 1 at a = 0.
        pull = share * torch.where(angles > 1e-7, angles / angles.sin().clamp_min(1e-300), 1.0)
        step = pull - (pull @ cosines) * centre
        size = float((step @ unit_TT @ step).clamp_min(0).sqrt())
        if size < tolerance:
            break
        sine, cosine = (
            torch.tensor(size, dtype=torch.float64).sin(),
            torch.tensor(size).double().cos(),
        )
        centre = _unit(cosine * centre + sine * step / size, unit_TT)
    found = centre * length
    return [float(value) for value in torch.where(norms > 0, found / norms.clamp_min(1e-300), 0.0)]


def normalised(gram_TT: torch.Tensor) -> torch.Tensor:
    """Cosines from inner products; 0 with a tensor of zeros, also of itself."""
    norms = gram_TT.diagonal().sqrt()
    scale = norms[:, None] * norms
    return torch.where(scale > 0, gram_TT / scale.clamp_min(1e-300), 0.0)


def _unit(coefficients: torch.Tensor, gram_TT: torch.Tensor) -> torch.Tensor:
    """The combination of length 1 in the same direction, or zeros if it has none."""
    length = float((coefficients @ gram_TT @ coefficients).clamp_min(0).sqrt())
    return coefficients / length if length > 1e-12 else torch.zeros_like(coefficients)
