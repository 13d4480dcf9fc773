"""What a cast is said to have lost, against float64."""

from __future__ import annotations

import pytest
import torch

from moesurg.surgery.casts import PIECE, relative_loss


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-22, 1e25])
@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float64, torch.bfloat16),
    ],
)
def test_the_loss_of_a_cast(wide: torch.dtype, narrow: torch.dtype, scale: float) -> None:
    """Over several pieces, with numbers whose squares float32 holds and others."""
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(3, PIECE - 7, generator=generator, dtype=torch.float64) * scale
    tensor = tensor.to(wide)
    cast = tensor.to(narrow)
    whole = tensor.double()
    expected = float((cast.double() - whole).norm() / whole.norm())
    assert relative_loss(tensor, cast) == pytest.approx(expected, rel=1e-4)


def test_a_cast_that_loses_nothing() -> None:
    halves = torch.randn(2 * PIECE, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert relative_loss(halves.float(), halves) == 0.0
    assert relative_loss(torch.zeros(5), torch.zeros(5, dtype=torch.bfloat16)) is None
