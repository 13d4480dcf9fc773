"""Logistic regression without intercept: scikit-learn's minimum, separable classes found, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moesurg.surgery.linalg.logistic import accuracy, fit, held_out


def clouds(rows: int, *, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three Gaussian clouds around directions at right angles, [N, 8] and their labels."""
    generator = torch.Generator().manual_seed(seed)
    label_N = torch.arange(3).repeat_interleave(rows)
    noise_ND = torch.randn(3 * rows, 8, generator=generator, dtype=torch.float64)
    scale_D = torch.logspace(-2, 2, 8, dtype=torch.float64)
    return (4 * torch.eye(8, dtype=torch.float64)[label_N] + spread * noise_ND) * scale_D, label_N


def test_it_is_the_minimum_that_scikit_learn_finds() -> None:
    from sklearn.linear_model import LogisticRegression

    x_ND, label_N = clouds(60, spread=3.0)
    l2 = 0.02
    found_CD = fit(x_ND, label_N, 3, l2=l2)
    rms_D = x_ND.square().mean(dim=0).sqrt()
    other = LogisticRegression(
        C=1 / (l2 * len(x_ND)), fit_intercept=False, tol=1e-10, max_iter=10000
    ).fit((x_ND / rms_D).numpy(), label_N.numpy())
    np.testing.assert_allclose(other.coef_, (found_CD * rms_D).numpy(), atol=1e-5)
    # The penalty keeps what all classes share out of the rows.
    assert float((found_CD * rms_D).sum(dim=0).abs().max()) < 1e-6


def test_classes_weigh_the_same_however_many_rows_they_have() -> None:
    x_ND, label_N = clouds(40, spread=2.0)
    more_M = torch.cat([torch.arange(len(x_ND)), torch.nonzero(label_N == 1).flatten().repeat(6)])
    once_CD = fit(x_ND, label_N, 3, l2=0.05)
    again_CD = fit(x_ND[more_M], label_N[more_M], 3, l2=0.05)
    rms_D = x_ND.square().mean(dim=0).sqrt()
    torch.testing.assert_close(again_CD * rms_D, once_CD * rms_D, atol=1e-5, rtol=0)


def test_separate_clouds_are_told_apart_and_labels_at_random_are_not() -> None:
    x_ND, label_N = clouds(200, spread=0.5)
    fresh_ND, _ = clouds(200, spread=0.5, seed=1)
    rows_CD = fit(x_ND, label_N, 3, l2=1e-3)
    assert accuracy(fresh_ND, label_N, rows_CD) > 0.99
    order = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(2))
    rows_CD = fit(x_ND, label_N[order], 3, l2=1e-3)
    assert accuracy(fresh_ND, label_N, rows_CD) < 0.6


def test_a_class_without_rows_or_no_penalty_is_refused() -> None:
    x_ND, label_N = clouds(4, spread=1.0)
    with pytest.raises(ValueError, match="every class"):
        fit(x_ND, label_N, 4, l2=1.0)
    with pytest.raises(ValueError, match="l2"):
        fit(x_ND, label_N, 3, l2=0.0)


def test_whole_sequences_are_held_out() -> None:
    sequence_N = torch.arange(10).repeat_interleave(3)
    assert torch.unique(sequence_N[held_out(sequence_N)]).tolist() == [2, 7]
    for alone in (0, 2):
        number_N = torch.full((10,), alone)
        assert held_out(number_N).tolist() == [False] * 8 + [True] * 2
