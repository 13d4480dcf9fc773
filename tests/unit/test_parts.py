"""Exact columns, integers and cosine bases: planted cases, optimality by exhaustion, and independent transforms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.fft import dct

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.linalg.cosine import cosine_basis, select
from moesurg.surgery.linalg.exact_parts import split_columns
from moesurg.surgery.linalg.lowrank import truncate
from moesurg.surgery.linalg.quantise import quantise


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("size", [100.0, 3.0])
def test_planted_columns_in_a_matrix_of_low_rank_are_found(rank: int, size: float) -> None:
    matrix = normal(20, rank, seed=1) @ normal(rank, 30, seed=2)
    places = torch.tensor([4, 11, 29])
    matrix[:, places] = size * normal(20, 3, seed=3)
    found = split_columns(matrix, rank, 3)
    assert torch.equal(found.index_S, places)
    assert found.rest.relative_error < 1e-6
    assert torch.allclose(found.dense(), matrix, atol=1e-7)


def test_the_ends_are_plain_truncation_and_exactness() -> None:
    matrix = normal(9, 12, seed=4)
    none = split_columns(matrix, 3, 0)
    assert torch.allclose(none.dense(), truncate(matrix, 3).product(), atol=1e-12)
    almost = split_columns(matrix, 1, 11)
    assert almost.error < 1e-6
    assert torch.allclose(almost.dense(), matrix)
    with pytest.raises(UsageError, match="12 of 12 columns"):
        split_columns(matrix, 3, 12)


def test_more_of_either_loses_no_more_and_the_error_is_the_distance() -> None:
    matrix = normal(14, 16, seed=5) * torch.logspace(0, 1, 16, dtype=torch.float64)
    previous: dict[int, float] = {}
    for count in (0, 1, 3, 6):
        for rank in (1, 4, 9):
            found = split_columns(matrix, rank, count)
            lost = float((found.dense() - matrix).norm())
            assert found.error == pytest.approx(lost, rel=1e-6)
            assert lost <= previous.get(rank, float("inf")) + 1e-9
            previous[rank] = lost
            # No worse than the published choice: the remainder's largest columns, kept as they are.
            if count:
                cut = truncate(matrix, rank)
                rest = (matrix - cut.product()).square().sum(dim=0).sort(descending=True).values
                assert lost <= float(rest[count:].sum()) ** 0.5 + 1e-9


def test_rounding_is_undone_by_decoding_the_packed_bytes() -> None:
    matrix = normal(5, 37, seed=6)
    for kind, bits, middle in (("int8", 8, 128), ("int4", 4, 8), ("ternary", 2, 1)):
        found = quantise(matrix, kind, 8)
        data = found.packed().numpy()
        assert data.shape == (5, -(-37 * bits // 8))
        codes = np.unpackbits(data, axis=1, bitorder="little").reshape(5, -1, bits)
        values = (codes * 2 ** np.arange(bits)).sum(axis=2)[:, :37] - middle
        scales = found.scales_MG.repeat_interleave(8, dim=1)[:, :37].numpy()
        assert np.allclose(values * scales, found.dense().numpy())


def test_ternary_is_the_best_there_is() -> None:
    row = torch.tensor([[0.9, -0.1, 0.5, -0.8, 0.05]], dtype=torch.float64)
    best = min(
        float((row - scale * codes).square().sum())
        for signs in itertools.product((-1.0, 0.0, 1.0), repeat=5)
        for codes in [torch.tensor([signs], dtype=torch.float64)]
        if codes.any()
        for scale in [float((row * codes).sum() / codes.square().sum())]
    )
    assert float((quantise(row, "ternary", 5).dense() - row).square().sum()) == pytest.approx(best)
    # The published rule, absolute mean: scale .20833 and these signs; ours loses no more.
    known = torch.tensor([[0, 0.2, -0.2, 0.4, -0.4, 0.05]], dtype=torch.float64)
    absmean = 0.2083333 * torch.tensor([[0, 1, -1, 1, -1, 0]], dtype=torch.float64)
    assert float(known.abs().mean()) == pytest.approx(0.20833, abs=1e-5)
    lost = float((quantise(known, "ternary", 6).dense() - known).square().sum())
    assert lost < float((absmean - known).square().sum())


def test_what_fits_the_grid_is_exact_and_bits_help() -> None:
    grid = 0.25 * torch.tensor([[-7.0, 3, 0, 7], [7, 1, -2, 5]])
    assert torch.allclose(quantise(grid, "int4", 4).dense(), grid.double())
    assert torch.allclose(
        quantise(torch.zeros(2, 4), "int4", 2).dense(), torch.zeros(2, 4).double()
    )
    matrix = normal(8, 64, seed=7)
    errors = [
        float((quantise(matrix, k, 16).dense() - matrix).norm())
        for k in ("int8", "int4", "ternary")
    ]
    assert errors == sorted(errors)
    plain = matrix.reshape(8, 4, 16)
    scale = plain.abs().amax(2, keepdim=True) / 7
    nearest = ((plain / scale).round() * scale).reshape(8, 64)
    assert errors[1] <= float((nearest - matrix).norm())
    with pytest.raises(InputError, match="not finite"):
        quantise(torch.tensor([[float("nan")]]), "int4", 1)


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_the_basis_is_the_orthonormal_transform(size: int) -> None:
    basis = cosine_basis(size)
    assert torch.allclose(basis @ basis.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    vector = normal(size, seed=8)
    assert np.allclose((basis @ vector).numpy(), dct(vector.numpy(), norm="ortho"))


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_selected_vectors_lose_least(side: str) -> None:
    matrix = normal(6, 8, seed=9)
    size = matrix.shape[side == "input"]
    basis = cosine_basis(size)
    for rank in (1, 3):
        found = select(matrix, rank, side)
        lost = float((found.dense() - matrix).norm())
        assert found.error == pytest.approx(lost)
        every = []
        for chosen in itertools.combinations(range(size), rank):
            projector = basis[list(chosen)].T @ basis[list(chosen)]
            image = matrix @ projector if side == "input" else projector @ matrix
            every.append(float((image - matrix).norm()))
        assert lost == pytest.approx(min(every))
    smooth = basis[2][None] if side == "input" else basis[2][:, None]
    assert select(smooth * 3, 1, side).error < 1e-12
    assert select(matrix, size, side).error < 1e-6
