"""Element-wise merging, exact selection and singular vectors: laws and known answers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import polar as scipy_polar

from moesurg.surgery.linalg import merge_rules as rules
from moesurg.surgery.linalg.selection import Taking, kth_largest
from moesurg.surgery.linalg.task_singular import isotropic, polar, triplets, tsv_merge


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(*tensors: torch.Tensor) -> torch.Tensor:
    flat = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
    return flat @ flat.T


@given(
    st.lists(
        st.sampled_from([0.0, 0.5, 1.0, 1.0000001, 1e-30, 7.0, -0.5, -1.0]), min_size=1, max_size=40
    ),
    st.integers(0, 41),
    st.integers(1, 7),
)
@settings(max_examples=200)
def test_the_k_largest_are_those_of_a_stable_sort(values: list[float], k: int, size: int) -> None:
    whole = torch.tensor(values, dtype=torch.float64)
    k = min(k, len(values))
    cut = kth_largest(lambda: iter(whole.split(size)), len(values), k)
    taking = Taking(cut)
    found = torch.cat([taking.mask(block) for block in whole.split(size)])
    wanted = torch.zeros(len(values), dtype=torch.bool)
    wanted[whole.abs().argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(found, wanted)
    taking = Taking(cut)
    trimmed = torch.cat([taking.trim_(block.clone()) for block in whole.split(size)])
    assert torch.equal(trimmed, whole * wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_do_not_change_what_is_selected(dtype: torch.dtype) -> None:
    whole = randn(50, 40).abs().to(dtype).round(decimals=2)
    one = Taking(kth_largest(lambda: iter([whole]), 2000, 777)).mask(whole)
    taking = Taking(kth_largest(lambda: iter(whole.split(7)), 2000, 777))
    many = torch.cat([taking.mask(block) for block in whole.split(7)])
    assert torch.equal(one, many)
    assert int(one.sum()) == 777


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 20_000, 99_999])
@pytest.mark.parametrize("case", ["continuous", "coarse", "misleading"])
def test_large_tensors_are_cut_in_one_pass_or_three(case: str, k: int, dtype: torch.dtype) -> None:
    """A sample that says nothing of the other blocks costs time, not exactness."""
    whole = randn(100_000).to(dtype)
    if case == "coarse":
        whole = whole.bfloat16().to(dtype)
    elif case == "misleading":
        whole[:30_000] *= 1e-3
    blocks = whole.split(30_000)
    looked = []

    def given() -> Iterator[torch.Tensor]:
        looked.append(0)
        return iter(blocks)

    taking = Taking(kth_largest(given, len(whole), k))
    found = torch.cat([taking.trim_(block.clone()) for block in blocks])
    wanted = torch.zeros(len(whole), dtype=torch.bool)
    wanted[whole.abs().argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(found, whole * wanted)
    if case != "misleading":
        assert len(looked) == 2  # the sample and the one pass
    elif k == 20_000:
        assert len(looked) == 4


def test_signs_are_elected_by_weight_and_agreement_is_averaged() -> None:
    changes = [
        torch.tensor([1.0, 3.0, -2.0, 0.0]).double(),
        torch.tensor([2.0, -1.0, 2.0, 5.0]).double(),
    ]
    found = rules.elected(changes, [1, 1])
    # 1 and 2 agree; 3 beats -1; -2 and 2 tie, plus is elected; zero abstains.
    assert found.merged.tolist() == [1.5, 3.0, 2.0, 5.0]
    assert found.conflicts == 2
    assert rules.elected(changes, [1, 1], normalize=False).merged.tolist() == [3, 3, 2, 5]
    # A weight turns the election, and counts in the mean.
    assert rules.elected(changes, [1, 4]).merged.tolist() == [1.8, -1.0, 2.0, 5.0]
    negative = rules.elected(changes, [1, -1]).merged
    assert negative.tolist() == [-2.0, 2.0, -2.0, -5.0]


def test_equal_changes_elect_themselves() -> None:
    change = randn(9, 7)
    assert torch.allclose(rules.elected([change] * 3, [1, 2, 0.5]).merged, change, rtol=1e-14)


def test_probabilities_follow_the_rank_in_the_row() -> None:
    found = rules.keep_probabilities(torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, 9.0]]), 0.5, 0.2)
    assert torch.allclose(found, torch.tensor([[0.6, 0.4, 0.5], [0.4, 0.5, 0.6]]))
    assert rules.keep_probabilities(torch.ones(4, 1), 0.7, 0.2).unique().tolist() == pytest.approx(
        [0.7]
    )
    many = rules.keep_probabilities(randn(5, 100), 0.3, 0.1)
    assert many.mean(dim=1).tolist() == pytest.approx([0.3] * 5)


@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
def test_slerp_is_the_rotation_in_the_plane_of_two_tensors(t: float) -> None:
    first, second = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.0, 3.0]).double()
    a, b = rules.slerp_coefficients(gram(first, second), t)
    assert a == pytest.approx(math.cos(t * math.pi / 2), abs=1e-12)
    assert b == pytest.approx(math.sin(t * math.pi / 2), abs=1e-12)


def test_slerp_of_parallel_tensors_is_linear() -> None:
    change = randn(5)
    assert rules.slerp_coefficients(gram(change, change), 0.3) == [0.7, 0.3]
    assert rules.slerp_coefficients(gram(change, change * 0), 0.3) == [0.7, 0.3]


def test_the_centre_of_two_tensors_of_one_length_is_their_slerp() -> None:
    first, second = (x / x.norm() for x in (randn(30), randn(30, seed=1)))
    products = gram(first, second)
    assert rules.karcher_coefficients(products, [0.7, 0.3]) == pytest.approx(
        rules.slerp_coefficients(products, 0.3), abs=1e-9
    )


def test_the_centre_has_no_pull_left() -> None:
    tensors = [randn(12, seed=seed) for seed in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    found = rules.karcher_coefficients(gram(*tensors), weights)
    centre = sum(c * tensor for c, tensor in zip(found, tensors, strict=True))
    assert isinstance(centre, torch.Tensor)
    lengths = [float(tensor.norm()) for tensor in tensors]
    assert float(centre.norm()) == pytest.approx(
        sum(w * n for w, n in zip(weights, lengths, strict=True))
    )
    point, pull = centre / centre.norm(), torch.zeros(12).double()
    for weight, tensor in zip(weights, tensors, strict=True):
        unit = tensor / tensor.norm()
        angle = torch.acos(unit @ point)
        pull += weight * angle / angle.sin() * (unit - angle.cos() * point)
    assert float(pull.norm()) < 1e-10


def test_stock_ratio_of_agreement_and_of_right_angles() -> None:
    eye = torch.eye(3).double()
    assert rules.stock_ratio(torch.ones(3, 3).double() * 4) == pytest.approx(1)
    assert rules.stock_ratio(eye) == 0
    assert rules.stock_ratio(2 * eye - 0.5) == 0
    assert rules.stock_ratio(torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()) == pytest.approx(
        2 / 3
    )


def test_the_polar_factor_is_scipys_on_full_rank_and_a_partial_isometry_below() -> None:
    full = randn(9, 4)
    assert torch.allclose(polar(full), torch.from_numpy(scipy_polar(full.numpy())[0]), atol=1e-12)
    low = torch.cat([full, full], dim=1)
    found = polar(low)
    assert torch.allclose(found @ found.T @ found, found, atol=1e-9)
    assert torch.linalg.matrix_rank(found) == 4


def low_rank(rows: int, columns: int, rank: int, seed: int = 0) -> torch.Tensor:
    return randn(rows, rank, seed=seed) @ randn(rank, columns, seed=seed + 100)


def merged(*changes: torch.Tensor, rank: int) -> torch.Tensor:
    found = tsv_merge([triplets(change, rank) for change in changes])
    assert found is not None
    return found


def test_tsv_of_one_task_of_equal_tasks_and_of_orthogonal_tasks() -> None:
    change = low_rank(16, 12, 3)
    assert torch.allclose(merged(change, rank=12), change, atol=1e-11)
    # Published code gives the square root of 3 times this.
    assert torch.allclose(merged(*[change] * 4, rank=3), change, atol=1e-9)
    left, right = torch.linalg.qr(randn(16, 16)).Q, torch.linalg.qr(randn(12, 12, seed=5)).Q
    tasks = [
        left[:, 3 * i : 3 * i + 3]
        @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double() + i)
        @ right[3 * i : 3 * i + 3]
        for i in range(3)
    ]
    # q = 4 is more than the rank: directions of zeros must not enter.
    assert torch.allclose(merged(*tasks, rank=4), sum(tasks, torch.zeros(())), atol=1e-10)


def test_tsv_ignores_order_and_scales_along() -> None:
    tasks = [randn(10, 8, seed=seed) for seed in range(3)]
    found = merged(*tasks, rank=2)
    assert torch.allclose(merged(*reversed(tasks), rank=2), found, atol=1e-10)
    assert torch.allclose(merged(*[3 * task for task in tasks], rank=2), 3 * found, atol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_a_flat_spectrum_keeps_the_sum_of_singular_values(full: bool) -> None:
    change = low_rank(16, 12, 5)
    before = torch.linalg.svdvals(change)
    after = torch.linalg.svdvals(isotropic(change, full=full))
    assert float(after.sum()) == pytest.approx(float(before.sum()))
    kept = 12 if full else 5
    assert torch.allclose(after[:kept], after[0].expand(kept), rtol=1e-9)
    assert float(after[kept:].sum()) < 1e-9
    assert not isotropic(change * 0).any()
