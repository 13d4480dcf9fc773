"""Ridge least squares of a change against dense float64 solvers."""

from __future__ import annotations

import pytest
import torch

from moesurg.surgery.errors import InputError
from moesurg.surgery.linalg import least_squares
from moesurg.surgery.linalg.least_squares import fit_change


def case(rows: int, width: int = 9, hidden: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    design = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return design, torch.randn(rows, hidden, generator=generator, dtype=torch.float64)


def ridge_of(design: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    """The same by QR of the design with the ridge's rows below it."""
    width = design.shape[1]
    added = ridge * float(design.square().sum()) / width
    stacked = torch.cat([design, added**0.5 * torch.eye(width, dtype=torch.float64)])
    padded = torch.cat([target, torch.zeros(width, target.shape[1], dtype=torch.float64)])
    found: torch.Tensor = torch.linalg.lstsq(stacked, padded).solution.T
    return found


@pytest.mark.parametrize("rows", [3, 8, 9, 40])
@pytest.mark.parametrize("ridge", [1e-6, 0.1, 3.0])
def test_it_is_the_dense_ridge_solution(rows: int, ridge: float) -> None:
    design, target = case(rows)
    found = fit_change(design, target, ridge)
    assert torch.allclose(found, ridge_of(design, target, ridge), atol=1e-8)


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    design, target = case(40)
    whole = fit_change(design, target, 0.1)
    monkeypatch.setattr(least_squares, "BLOCK_ROWS", 7)
    assert torch.allclose(fit_change(design, target, 0.1), whole, atol=1e-12)


def test_without_a_ridge_it_is_plain_least_squares() -> None:
    design, target = case(40)
    expected = torch.linalg.lstsq(design, target).solution.T
    assert torch.allclose(fit_change(design, target, 0.0), expected, atol=1e-10)


def test_a_singular_system_is_refused_and_a_ridge_solves_it() -> None:
    design, target = case(40)
    design[:, 1] = design[:, 0]
    for rows in (40, 5):
        with pytest.raises(InputError, match="singular"):
            fit_change(design[:rows], target[:rows], 0.0)
        assert fit_change(design[:rows], target[:rows], 1e-3).isfinite().all()


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("ridge", [1e-8, 0.3, 100.0])
def test_the_error_never_grows(rows: int, ridge: float) -> None:
    design, target = case(rows)
    change = fit_change(design, target, ridge)
    assert (target - design @ change.T).norm() <= target.norm()


def test_a_design_of_zeros_changes_nothing() -> None:
    _, target = case(40)
    assert not fit_change(torch.zeros(40, 9), target, 0.1).any()
