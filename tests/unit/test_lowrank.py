"""Truncation against planted spectra, LAPACK's own decomposition, and the published whitening."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesurg.surgery.errors import InputError, UsageError
from moesurg.surgery.linalg.lowrank import LowRank, singular_values, truncate, truncate_randomised
from moesurg.surgery.linalg.pivot import pack, stored
from moesurg.surgery.linalg.whitening import truncate_whitened


def planted(rows: int, columns: int, spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(spectrum), generator=generator, dtype=torch.float64))[
            0
        ]
        for size in (rows, columns)
    )
    return left * spectrum @ right.T


def like_weights(count: int) -> torch.Tensor:
    """A flat bulk and a few large values, as feed-forwards have."""
    place = torch.arange(1, count + 1, dtype=torch.float64)
    return 0.35 * (1 - (place - 1) / count) + place**-0.7


SPECTRA = {
    "weights": like_weights(48),
    "power": torch.arange(1, 49, dtype=torch.float64) ** -0.5,
    "exponential": torch.exp(-8 * torch.arange(48, dtype=torch.float64) / 48),
}


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(130, 48), (48, 130), (48, 48)])
@pytest.mark.parametrize("rank", [1, 12, 24, 47])
def test_the_error_is_the_tail_of_a_planted_spectrum(
    name: str, shape: tuple[int, int], rank: int
) -> None:
    spectrum = SPECTRA[name]
    matrix = planted(*shape, spectrum)
    found = truncate(matrix, rank)
    tail = float(spectrum[rank:].square().sum().sqrt())
    assert found.error == pytest.approx(tail, rel=1e-6)
    assert float((found.product() - matrix).norm()) == pytest.approx(tail, rel=1e-6)
    assert found.norm == pytest.approx(float(spectrum.norm()), rel=1e-12)
    left, right = found.balanced()
    assert torch.allclose(left @ right, found.product(), atol=1e-12)
    strengths = left.norm(dim=0) * right.norm(dim=1)
    assert torch.allclose(strengths, spectrum[:rank], rtol=1e-5)


@pytest.mark.parametrize("power", [1, 4])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_sketch_stays_within_its_band(name: str, power: int) -> None:
    for rank in (4, 24):
        matrix = planted(130, 48, SPECTRA[name]).float()
        found = truncate_randomised(matrix, rank, np.random.default_rng(3), power=power)
        tail = float(SPECTRA[name][rank:].square().sum().sqrt())
        assert tail * (1 - 1e-3) <= float((found.product() - matrix).norm())
        assert float((found.product() - matrix).norm()) <= tail * (1.10 if power == 1 else 1.02)
        assert found.error == pytest.approx(
            float((found.product() - matrix).norm()), rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (7, 20), (20, 7)])
def test_every_shape_and_type_gives_the_optimum(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator).to(dtype)
    for rank in range(1, min(shape) + 1):
        for found in (
            truncate(matrix, rank),
            truncate_whitened(matrix, torch.eye(shape[1]), rank),
        ):
            assert torch.allclose(found.product(), best(matrix, rank), atol=1e-6)


def test_a_transposed_view_and_a_slice_are_read_as_they_are() -> None:
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    for view in (matrix.T, matrix[::2], matrix[:, 3:20]):
        assert not view.is_contiguous()
        assert torch.allclose(truncate(view, 5).product(), best(view, 5), atol=1e-6)


def test_rank_deficient_and_zero_matrices() -> None:
    low = planted(40, 24, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    for rank in (3, 10, 24):
        found = truncate(low, rank)
        assert torch.allclose(found.product(), low, atol=1e-12)
        assert found.error < 1e-6
        assert torch.allclose(pack(*found.balanced()).unpack(), low, atol=1e-12)
    zero = truncate(torch.zeros(6, 4), 2)
    assert zero.error == zero.relative_error == 0
    assert not zero.product().any()
    assert not pack(*zero.balanced()).unpack().any()
    assert int((singular_values(low) > 1e-6).sum()) == 3


def test_the_exponential_spectrum_at_half_rank_does_not_crash() -> None:
    spectrum = torch.exp(-30 * torch.arange(64, dtype=torch.float64) / 64)
    matrix = planted(200, 64, spectrum).float()
    assert truncate_randomised(matrix, 32, np.random.default_rng(0)).relative_error < 1e-2
    assert truncate(matrix, 32).relative_error < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    matrix = torch.ones(5, 4)
    matrix[2, 1] = bad
    with pytest.raises(InputError, match="not finite"):
        truncate(matrix, 2)
    with pytest.raises(InputError, match="not finite"):
        truncate_randomised(matrix, 2, np.random.default_rng(0))
    for shape in ((5, 4), (40, 4)):
        with pytest.raises(InputError, match="not finite"):
            truncate_whitened(matrix[:1].repeat(shape[0], 1) * bad, torch.eye(4), 2)


@pytest.mark.parametrize("rank", [0, 5])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(UsageError, match=f"rank {rank}"):
        truncate(torch.ones(6, 4), rank)
    with pytest.raises(UsageError, match="Gram matrix"):
        truncate_whitened(torch.ones(6, 4), torch.eye(6), 2)


def test_signs_do_not_depend_on_the_sign_of_the_matrix() -> None:
    matrix = planted(30, 20, like_weights(20))
    for first, second in ((matrix, -matrix), (matrix.T, -matrix.T)):
        one, two = truncate(first, 4), truncate(second, 4)
        basis = "right_RN" if first.shape[0] >= first.shape[1] else "left_MR"
        assert torch.equal(getattr(one, basis), getattr(two, basis))


def test_a_slice_is_a_truncation() -> None:
    matrix = planted(30, 20, like_weights(20))
    wide, narrow = truncate(matrix, 9), truncate(matrix, 4)
    sliced = wide.left_MR[:, :4] @ wide.right_RN[:4]
    assert torch.allclose(sliced, narrow.product(), atol=1e-12)


# Whitening


def published(matrix: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """SVD-LLM as printed: Cholesky factor, decomposition, inverse."""
    lower = torch.linalg.cholesky(gram)
    left, values, right = torch.linalg.svd(matrix @ lower, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank] @ torch.linalg.inv(lower)


def loss(matrix: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (matrix - other).T).norm())


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (60, 20)])
def test_whitening_is_svd_llm(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    inputs = torch.randn(300, shape[1], generator=generator, dtype=torch.float64) @ mix
    gram = inputs.T @ inputs
    for rank in (1, 7, min(shape) - 1):
        found = truncate_whitened(matrix, gram, rank)
        wanted = published(matrix, gram, rank)
        assert float((found.product() - wanted).norm() / wanted.norm()) < 1e-10
        assert found.error == pytest.approx(loss(matrix, wanted, inputs), rel=1e-8)
        assert found.norm == pytest.approx(loss(matrix, matrix * 0, inputs), rel=1e-10)
        assert found.error < loss(matrix, truncate(matrix, rank).product(), inputs)
        eye = torch.eye(shape[1], dtype=torch.float64)
        plain = truncate_whitened(matrix, 5 * eye, rank)
        assert torch.allclose(plain.product(), truncate(matrix, rank).product(), atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 24), (60, 20)])
def test_fewer_tokens_than_inputs_still_give_the_optimum(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(10, shape[1], generator=generator, dtype=torch.float64)
    gram = inputs.T @ inputs
    values = torch.linalg.svdvals(inputs @ matrix.T)
    for rank in (3, 9):
        found = truncate_whitened(matrix, gram, rank)
        optimum = float(values[rank:].square().sum().sqrt())
        assert loss(matrix, found.product(), inputs) == pytest.approx(optimum, rel=1e-6)
    # Ten directions suffice for ten tokens; damping spends the others on the weights themselves.
    exact, damped = (truncate_whitened(matrix, gram, 15, damping=d) for d in (0.0, 1e-9))
    for found in (exact, damped):
        assert loss(matrix, found.product(), inputs) < 1e-4 * float(values.norm())
    assert float((damped.product() - matrix).norm()) <= float((exact.product() - matrix).norm())


# Pivot form


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
@pytest.mark.parametrize("rank", [1, 10, 23, 24])
def test_the_pivot_form_loses_nothing(shape: tuple[int, int], rank: int) -> None:
    found = truncate(planted(*shape, like_weights(24)), rank)
    packed = pack(*found.balanced())
    assert torch.allclose(packed.unpack(), found.product(), atol=1e-12)
    numbers = packed.rows_RN.numel() + packed.coef_SR.numel() + packed.index_R.numel()
    assert numbers == stored(*shape, rank) == rank * (sum(shape) - rank) + rank
    assert float(packed.coef_SR.abs().max()) < 4 if packed.coef_SR.numel() else True
    assert torch.equal(packed.index_R, packed.index_R.unique())


def test_the_pivot_form_in_single_and_half_precision() -> None:
    found = truncate(planted(200, 96, like_weights(96)), 48)
    whole = found.product()
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        unpacked = pack(found.left_MR, found.right_RN).cast(dtype).unpack().double()
        assert float((unpacked - whole).norm() / whole.norm()) < bound


def test_reported_properties() -> None:
    found = LowRank(torch.ones(3, 2), torch.ones(2, 4), 1.0, 4.0)
    assert (found.rank, found.relative_error) == (2, 0.25)


@pytest.mark.parametrize("shape", [(700, 300), (300, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_finds_the_optimum_of_large_matrices(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """The float32 path: optimal, orthonormal, and its error is the one of its product."""
    generator = torch.Generator().manual_seed(0)
    small = min(shape)
    place = torch.arange(1, small + 1)
    values = 0.35 * (1 - (place - 1) / small) + place**-0.7
    left, right = (
        torch.linalg.qr(torch.randn(size, small, generator=generator))[0] for size in shape
    )
    weight = (left * values @ right.T).to(dtype)
    exact = torch.linalg.svdvals(weight.double())
    for rank in (15, 75, 200):
        found = truncate(weight, rank)
        best = float(exact[rank:].square().sum() ** 0.5)
        assert found.error == pytest.approx(best, rel=1e-6)
        held = float((found.product() - weight.double()).norm())
        assert held == pytest.approx(best, rel=1e-9, abs=1e-12) or held / best - 1 < 1e-8
        basis = found.right_RN if shape[0] > shape[1] else found.left_MR.T
        assert torch.allclose(basis @ basis.T, torch.eye(rank, dtype=torch.float64), atol=1e-10)


def test_what_single_precision_cannot_resolve_is_done_in_double() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.exp(-30.0 * torch.arange(300) / 300)
    left, right = (
        torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    weight = (left * values @ right.T).float()
    exact = torch.linalg.svdvals(weight.double())
    found = truncate(weight, 100)
    assert found.error == pytest.approx(float(exact[100:].square().sum() ** 0.5), rel=1e-3)
    # Nor is it asked about numbers at the ends of its range.
    scaled = truncate(weight * 1e-18, 100)
    assert scaled.relative_error == pytest.approx(found.relative_error, rel=1e-2)


@pytest.mark.parametrize("rank", [1, 40, 89, 91, 149])
@pytest.mark.parametrize("kind", ["orthogonal", "half rank", "two levels"])
def test_single_precision_is_orthonormal_where_directions_cannot_be_told_apart(
    kind: str, rank: int
) -> None:
    """Equal singular values, and more zeros than the rank: any basis is optimal, but it has to be one."""
    values = {
        "orthogonal": torch.ones(300),
        "half rank": torch.cat([like_weights(150).float(), torch.zeros(150)]),
        "two levels": torch.cat([torch.full((90,), 2.0), torch.ones(210)]),
    }[kind].double()
    weight = planted(400, 300, values).float()
    found = truncate(weight, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(found.right_RN @ found.right_RN.T, eye, atol=1e-10)
    tail = float(values[rank:].square().sum().sqrt())
    assert float((found.product() - weight.double()).norm()) == pytest.approx(tail, rel=1e-5)
    assert found.error == pytest.approx(tail, rel=1e-5)
