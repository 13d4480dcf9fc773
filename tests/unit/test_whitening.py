"""Scaled and shifted truncation against explicit least squares and decompositions."""

from __future__ import annotations

import pytest
import torch

from moesurg.surgery.errors import UsageError
from moesurg.surgery.linalg.lowrank import truncate
from moesurg.surgery.linalg.whitening import (
    truncate_scaled,
    truncate_shifted,
    truncate_whitened,
    whitened_values,
)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize("shape", [(12, 20), (40, 9)])
def test_scaling_is_whitening_with_a_diagonal(shape: tuple[int, int]) -> None:
    matrix, scale = normal(*shape, seed=1), normal(shape[1], seed=2).abs() + 0.1
    found = truncate_scaled(matrix, scale, 4)
    whitened = truncate_whitened(matrix, torch.diag(scale.square()), 4)
    assert torch.allclose(found.product(), whitened.product(), atol=1e-9)
    assert torch.allclose(found.product(), nearest(matrix * scale, 4) / scale, atol=1e-9)
    assert found.error == pytest.approx(float(((found.product() - matrix) * scale).norm()))
    even = truncate_scaled(matrix, torch.full((shape[1],), 3.0), 4)
    assert torch.allclose(even.product(), truncate(matrix, 4).product(), atol=1e-9)


def test_a_channel_without_strength_can_be_scaled_back() -> None:
    matrix, scale = normal(6, 5, seed=3), torch.tensor([0.0, 2.0, 0.5, 1.0, 1.0])
    found = truncate_scaled(matrix, scale, 5)
    assert torch.allclose(found.product(), matrix, atol=1e-9)
    nothing = truncate_scaled(matrix, torch.zeros(5), 2)
    assert torch.allclose(nothing.product(), truncate(matrix, 2).product())
    with pytest.raises(UsageError, match="scale"):
        truncate_scaled(matrix, torch.ones(6), 2)


@pytest.mark.parametrize("tokens", [50, 7])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_shifted_inputs_are_fitted_as_well_as_any_matrix_of_the_rank(
    tokens: int, rank: int
) -> None:
    matrix, inputs = normal(10, 8, seed=4), normal(tokens, 8, seed=5)
    shifted = inputs + 0.5 * normal(tokens, 8, seed=6)
    wanted = inputs @ matrix.T
    gram, cross = shifted.T @ shifted, inputs.T @ shifted
    found = truncate_shifted(matrix, gram, cross, rank)

    def loss(candidate: torch.Tensor) -> float:
        return float((wanted - shifted @ candidate.T).square().sum())

    # Reduced-rank regression: project the least-squares fit on its own leading output directions.
    fit = torch.linalg.lstsq(shifted, wanted, driver="gelsd").solution
    outputs = shifted @ fit
    leading = torch.linalg.svd(outputs, full_matrices=False)[2][:rank]
    best = float((wanted - outputs @ leading.T @ leading).square().sum())
    assert loss(found.product()) == pytest.approx(best, rel=1e-7, abs=1e-7)
    assert found.error**2 + loss(fit.T) == pytest.approx(best, rel=1e-7, abs=1e-7)
    blind = truncate_whitened(matrix, inputs.T @ inputs, rank)
    assert loss(found.product()) <= loss(blind.product()) + 1e-9


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_asks_for_outputs_on_a_mixture_of_both_inputs(share: float) -> None:
    matrix, inputs = normal(10, 8, seed=4), normal(50, 8, seed=5)
    shifted = inputs + 0.5 * normal(50, 8, seed=6)
    gram, cross = shifted.T @ shifted, inputs.T @ shifted
    found = truncate_shifted(matrix, gram, cross, 3, share=share)
    mixed = share * inputs + (1 - share) * shifted
    wanted = truncate_shifted(matrix, gram, mixed.T @ shifted, 3)
    assert torch.allclose(found.product(), wanted.product(), atol=1e-9)
    if not share:
        blind = truncate_whitened(matrix, gram, 3)
        assert torch.allclose(found.product(), blind.product(), atol=1e-9)
    # Whatever the damping, a full rank goes no further from the matrix than its share.
    for damping in (0.0, 0.1, 10.0):
        whole, part = (
            truncate_shifted(matrix, gram, cross, 8, damping=damping, share=value).product()
            for value in (1.0, share)
        )
        assert torch.allclose(part - matrix, share * (whole - matrix), atol=1e-9)


@pytest.mark.parametrize("tokens", [400, 20])
def test_a_cholesky_factor_and_eigenvectors_solve_alike(tokens: int) -> None:
    """Scales of channels that differ a thousandfold, definite and singular, and a matrix stored in float32."""
    inputs = normal(tokens, 30, seed=7) * torch.logspace(0, 3, 30, dtype=torch.float64)
    shifted = inputs * (1 + 0.1 * normal(tokens, 30, seed=8))
    matrix, cross = normal(12, 30, seed=9), inputs.T @ shifted
    for gram in (shifted.T @ shifted, (shifted.T @ shifted).float().double()):
        for damping in (1e-4, 1e-2):
            found = truncate_shifted(matrix, gram, cross, 12, damping=damping)
            ridge = damping * gram.diagonal().mean() * torch.eye(30, dtype=torch.float64)
            explicit = matrix @ (cross + ridge) @ torch.linalg.pinv(gram + ridge, hermitian=True)
            assert torch.allclose(found.product(), explicit, rtol=1e-6, atol=1e-6)


def test_inputs_that_are_not_shifted_give_the_whitened_truncation() -> None:
    matrix, inputs = normal(10, 8, seed=4), normal(50, 8, seed=5)
    gram = inputs.T @ inputs
    for damping in (0.0, 0.1):
        plain = truncate_whitened(matrix, gram, 3, damping=damping)
        found = truncate_shifted(matrix, gram, gram, 3, damping=damping)
        assert torch.allclose(found.product(), plain.product(), atol=1e-9)
    with pytest.raises(UsageError, match="Gram"):
        truncate_shifted(matrix, gram, gram[:4, :4], 3)


@pytest.mark.parametrize("shape", [(7, 12), (30, 6)])
def test_the_spectrum_of_outputs_tells_the_loss_of_every_rank(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    weight_MN = torch.randn(*shape, generator=generator, dtype=torch.float64)
    inputs_TN = torch.randn(50, shape[1], generator=generator, dtype=torch.float64)
    gram_NN = inputs_TN.T @ inputs_TN
    values_P = whitened_values(weight_MN, gram_NN)
    assert values_P.numpy() == pytest.approx(
        torch.linalg.svdvals(inputs_TN @ weight_MN.T)[: min(shape)].numpy(), rel=1e-9
    )
    for rank in (1, 3, 5):
        lost = truncate_whitened(weight_MN, gram_NN, rank).error
        assert lost == pytest.approx(float(values_P[rank:].square().sum() ** 0.5), rel=1e-6)
