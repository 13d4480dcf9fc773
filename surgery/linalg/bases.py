"""Matrices of several experts as private factors times a nonlinear function of mixed, shared bases.

W_e = A_e f(sum_j w_ej B_j), with E experts, matrices [P, D], A_e [P, R], M bases B_j [R, D]; a basis may be a product
of [R, K] and [K, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .lowrank import truncate
from .pivot import Pivoted, pack

START = 0.1
"""Root mean square of what the function is given at the start: little enough for it to be nearly linear."""

RATE = 0.01
RIDGE = 1e-6


@dataclass(frozen=True)
class Mixed:
    """What was fitted, float64.

    Attributes:
        private: A_e [P, R] each.
        mix_EM: weights of the bases.
        bases: B_j [R, D] each; of low rank, in pivot rows.
        transposed: the matrices are the transposes of what the factors give.
        errors: relative Frobenius error at the start and at the end; the second is never larger.
    """

    private: list[torch.Tensor]
    mix_EM: torch.Tensor
    bases: list[torch.Tensor] | list[Pivoted]
    activation: str
    transposed: bool
    errors: tuple[float, float]

    def weight(self, expert: int) -> torch.Tensor:
        """The matrix [out, in] an expert is left with."""
        whole = [basis.unpack() if isinstance(basis, Pivoted) else basis for basis in self.bases]
        mixed_RD = torch.einsum("m,mrd->rd", self.mix_EM[expert], torch.stack(whole))
        made = self.private[expert] @ _function(self.activation, mixed_RD)
        return made.T.contiguous() if self.transposed else made

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {"private": torch.stack(self.private), "mix": self.mix_EM}
        low = [basis for basis in self.bases if isinstance(basis, Pivoted)]
        if not low:
            full = [basis for basis in self.bases if isinstance(basis, torch.Tensor)]
            return {**found, "bases": torch.stack(full)}
        return {
            **found,
            "left": torch.stack([basis.coef_SR for basis in low]),
            "right": torch.stack([basis.rows_RN for basis in low]),
            "pivots": torch.stack([basis.index_R for basis in low]),
        }


def fit_bases(
    matrices: Sequence[torch.Tensor],
    inner: int,
    count: int,
    steps: int,
    rng: np.random.Generator,
    *,
    rank: int = 0,
    activation: str = "silu",
    transposed: bool = False,
    stepped: Callable[[], None] = lambda: None,
) -> Mixed:
    """Fit bases and mixing weights by Adam; the private factors are solved for in every step.

    Full batches of one projection of all experts, so that the same seed gives the same bits on one thread. The best
    step counts, the start included.

    Args:
        matrices: [P, D] each, or [D, P] if ``transposed``.
        inner: R.
        count: M.
        rank: K, or 0 for bases of full rank, whose mixing weights are a softmax.
        stepped: called after every step.
    """
    with torch.inference_mode(False), torch.enable_grad():
        stacked = [matrix.T if transposed else matrix for matrix in matrices]
        weights_EPD = torch.stack([matrix.detach().float().clone() for matrix in stacked])
        scale = float(weights_EPD.std()) or 1.0
        weights_EPD /= scale
        start = _low_start if rank else _full_start
        parameters = start(weights_EPD, inner, count, rank, rng)
        best, errors = _descend(weights_EPD, parameters, steps, activation, bool(rank), stepped)
        mix_EM, bases_MRD, factors = _assemble([p.double() for p in best], bool(rank))
        cores_ERD = _function(activation, torch.einsum("em,mrd->erd", mix_EM, bases_MRD))
        private_EPR = _solve(weights_EPD.double(), cores_ERD) * scale
    kept: list[torch.Tensor] | list[Pivoted] = list(bases_MRD)
    if rank:
        kept = [pack(left, right) for left, right in factors]
    return Mixed(list(private_EPR), mix_EM, kept, activation, transposed, errors)


def _descend(
    weights_EPD: torch.Tensor,
    parameters: list[torch.Tensor],
    steps: int,
    activation: str,
    low: bool,
    stepped: Callable[[], None],
) -> tuple[list[torch.Tensor], tuple[float, float]]:
    """The best parameters met, and the relative errors of the first and the best."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, lr=RATE)
    total = float(weights_EPD.square().sum()) or 1.0
    first = least = math.inf
    best: list[torch.Tensor] = []
    for step in range(steps + 1):
        mix_EM, bases_MRD, _ = _assemble(parameters, low)
        cores_ERD = _function(activation, torch.einsum("em,mrd->erd", mix_EM, bases_MRD))
        # At the best private factors their own gradient is zero, so that they need none.
        private_EPR = _solve(weights_EPD, cores_ERD.detach())
        loss = (weights_EPD - private_EPR @ cores_ERD).square().sum() / total
        value = float(loss.detach())
        first = value if step == 0 else first
        if value < least:
            least, best = value, [parameter.detach().clone() for parameter in parameters]
        if step == steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        stepped()
    return best, (first**0.5, least**0.5)


def _assemble(
    parameters: Sequence[torch.Tensor], low: bool
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    if low:
        mix_EM, left_MRK, right_MKD = parameters
        return mix_EM, left_MRK @ right_MKD, list(zip(left_MRK, right_MKD, strict=True))
    logits_EM, bases_MRD = parameters
    return logits_EM.softmax(dim=1), bases_MRD, []


def _solve(weights_EPD: torch.Tensor, cores_ERD: torch.Tensor) -> torch.Tensor:
    """The least-squares private factors, with a ridge that keeps equal rows apart."""
    gram_ERR = cores_ERD @ cores_ERD.mT
    mean_E = gram_ERR.diagonal(dim1=1, dim2=2).mean(dim=1)
    eye_RR = torch.eye(gram_ERR.shape[1], dtype=gram_ERR.dtype)
    ridge_E = RIDGE * mean_E.clamp_min(torch.finfo(torch.float32).tiny)
    found: torch.Tensor = torch.linalg.solve(
        gram_ERR + ridge_E[:, None, None] * eye_RR, cores_ERD @ weights_EPD.mT
    ).mT
    return found


def _full_start(
    weights_EPD: torch.Tensor, inner: int, count: int, rank: int, rng: np.random.Generator
) -> list[torch.Tensor]:
    """Each basis spans what its share of the experts, consecutive ones, projects on."""
    experts, _, columns = weights_EPD.shape
    logits_EM = torch.zeros(experts, count)
    bases = []
    for index, group in enumerate(np.array_split(np.arange(experts), count)):
        logits_EM[group, index] = 1.0
        stacked = weights_EPD[group].reshape(-1, columns)
        bases.append(truncate(stacked, inner).right_RN.float())
    bases_MRD = torch.stack([_amplitude(basis) for basis in bases])
    return [logits_EM, bases_MRD]


def _low_start(
    weights_EPD: torch.Tensor, inner: int, count: int, rank: int, rng: np.random.Generator
) -> list[torch.Tensor]:
    """One basis an expert: its leading directions, spread by a random orthonormal matrix."""
    experts = len(weights_EPD)
    mix_EM = torch.zeros(experts, count)
    lefts, rights = [], []
    for index in range(count):
        mix_EM[index::count, index] = 1.0
        right_KD = truncate(weights_EPD[index % experts], rank).right_RN.float()
        draw = torch.from_numpy(rng.standard_normal((inner, rank))).float()
        left_RK = torch.linalg.qr(draw)[0]
        size = float((left_RK @ right_KD).square().mean()) ** 0.5 or 1.0
        lefts.append(left_RK * (START / size) ** 0.5)
        rights.append(right_KD * (START / size) ** 0.5)
    return [mix_EM, torch.stack(lefts), torch.stack(rights)]


def _amplitude(basis: torch.Tensor) -> torch.Tensor:
    return basis * (START / (float(basis.square().mean()) ** 0.5 or 1.0))


def _function(name: str, value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(value) if name == "silu" else value.tanh()
