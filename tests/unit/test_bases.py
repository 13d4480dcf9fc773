"""The fit of mixed bases: it recovers what was planted, never ends worse, and stores what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesurg.surgery.linalg.bases import Mixed, fit_bases
from moesurg.surgery.linalg.sharing import share_input


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(matrices: list[torch.Tensor], found: Mixed) -> float:
    lost = sum(float((w - found.weight(e)).square().sum()) for e, w in enumerate(matrices))
    return (lost / sum(float(w.square().sum()) for w in matrices)) ** 0.5


def fitted(matrices: list[torch.Tensor], steps: int, **options: object) -> Mixed:
    values = {"inner": 5, "count": 2, **options}
    return fit_bases(matrices, steps=steps, rng=np.random.default_rng(0), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_the_stored_tensors_are_the_definition(
    rank: int, transposed: bool, activation: str
) -> None:
    shape = (12, 7) if transposed else (7, 12)
    matrices = [normal(*shape, seed=e) for e in range(4)]
    found = fitted(matrices, 3, rank=rank, transposed=transposed, activation=activation)
    held = found.tensors()
    function = torch.nn.functional.silu if activation == "silu" else torch.tanh
    bases = []
    for j in range(2):
        if not rank:
            bases.append(held["bases"][j])
            continue
        whole = torch.zeros(5, 12, dtype=torch.float64)
        pivots = held["pivots"][j].long()
        others = [row for row in range(5) if row not in pivots.tolist()]
        whole[pivots] = held["right"][j]
        whole[others] = held["left"][j] @ held["right"][j]
        bases.append(whole)
    for e in range(4):
        mixed = sum(held["mix"][e, j] * bases[j] for j in range(2))
        made = held["private"][e] @ function(mixed)
        assert torch.allclose(found.weight(e), made.T if transposed else made, atol=1e-9)
    if not rank:
        assert torch.allclose(held["mix"].sum(1), torch.ones(4, dtype=torch.float64))
    assert distance(matrices, found) == pytest.approx(found.errors[1], rel=1e-3)


def test_steps_help_and_never_hurt_and_the_seed_decides() -> None:
    matrices = [normal(8, 12, seed=e) for e in range(6)]
    for rank in (0, 3):
        errors = [fitted(matrices, steps, rank=rank).errors for steps in (0, 60)]
        assert errors[0][0] == errors[0][1] == errors[1][0]
        assert errors[1][1] < 0.98 * errors[1][0]
    one, two = (fitted(matrices, 5, rank=3) for _ in range(2))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name])


def test_experts_that_share_an_input_space_are_nearly_exact_at_the_start() -> None:
    """In the nearly linear range one basis is MoLAE's shared projection."""
    space = normal(5, 12, seed=9)
    matrices = [normal(8, 5, seed=e) @ space for e in range(4)]
    start = fitted(matrices, 0, count=1, activation="tanh").errors[0]
    assert start < 0.05
    loose = [matrix + 0.5 * normal(8, 12, seed=20 + e) for e, matrix in enumerate(matrices)]
    shared = share_input(loose, 5, 1)
    linear = sum(float((w - shared.weight(e)).square().sum()) for e, w in enumerate(loose))
    linear = (linear / sum(float(w.square().sum()) for w in loose)) ** 0.5
    assert fitted(loose, 0, count=1, activation="tanh").errors[0] == pytest.approx(linear, rel=0.05)


def test_scale_does_not_matter() -> None:
    matrices = [normal(8, 12, seed=e) for e in range(4)]
    one, two = fitted(matrices, 4), fitted([1000 * matrix for matrix in matrices], 4)
    assert torch.allclose(1000 * one.weight(1), two.weight(1), rtol=1e-2, atol=10)
    assert one.errors[1] == pytest.approx(two.errors[1], rel=1e-3)
