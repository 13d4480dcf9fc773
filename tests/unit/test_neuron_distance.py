"""REAM's neuron matching on permuted copies."""

from __future__ import annotations

import pytest
import torch

from moesurg.surgery.linalg.neuron_distance import align_normalised
from tests.unit.test_linalg import expert, permuted


def activations(source: tuple[torch.Tensor, ...], rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(rows @ source[0].T) * (rows @ source[1].T)


@pytest.mark.parametrize(("weights", "acts"), [(True, True), (True, False), (False, True)])
def test_a_permuted_copy_is_recovered(weights: bool, acts: bool) -> None:
    reference = expert(0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    target = permuted(reference, order)
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(2))
    pair = (activations(reference, rows), activations(target, rows)) if acts else None
    found = align_normalised(reference, target, weights=weights, activations=pair)
    assert torch.equal(found.order_F, torch.argsort(order))
    assert found.after < 1e-3 < found.before


def test_activations_on_other_tokens_have_nothing_in_common() -> None:
    """Why one token set serves all experts: with two, a permuted copy is not recovered."""
    reference = expert(0, width=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    target = permuted(reference, order)
    first, second = (
        torch.randn(80, 7, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)
    )
    pair = activations(reference, first), activations(target, second)
    found = align_normalised(reference, target, weights=False, activations=pair)
    assert float((found.order_F == torch.argsort(order)).float().mean()) < 0.2


def test_lengths_do_not_count_and_zeros_are_allowed() -> None:
    reference = expert(0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    gate, up, down = permuted(reference, order)
    scaled = (3 * gate, 3 * up, 3 * down)
    found = align_normalised(reference, scaled, weights=True, activations=None)
    assert torch.equal(found.order_F, torch.argsort(order))
    nothing = tuple(torch.zeros_like(matrix) for matrix in reference)
    empty = align_normalised(reference, nothing, weights=True, activations=None)  # type: ignore[arg-type]
    assert sorted(empty.order_F.tolist()) == list(range(12))


def test_it_is_the_minimum_over_all_assignments() -> None:
    import itertools

    first, second = expert(3, width=5), expert(4, width=5)
    found = align_normalised(first, second, weights=True, activations=None)

    def rows(source: tuple[torch.Tensor, ...]) -> torch.Tensor:
        joined = torch.cat([source[0], source[1], source[2].T], dim=1).double()
        return joined / joined.norm(dim=1, keepdim=True)

    distance = torch.cdist(rows(first), rows(second))
    best = min(
        float(sum(distance[r, t] for r, t in enumerate(p)))
        for p in itertools.permutations(range(5))
    )
    assert found.after * 5 == pytest.approx(best, rel=1e-9)
