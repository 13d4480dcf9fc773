"""Matrices of three values: the known answer, packing, bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesurg.surgery.linalg.ternary import pack, quantise, unpack


def test_known_answer() -> None:
    codes, alpha = quantise(torch.tensor([[0.5, -0.2], [0.05, -1.0]]))
    assert alpha == pytest.approx(0.4375, abs=1e-8)
    assert codes.tolist() == [[1, 0], [0, -1]]


def test_halves_go_to_even_and_zeros_have_a_scale() -> None:
    # Mean |W| is 1: 0.5 and -0.5 lie between two codes.
    codes, alpha = quantise(torch.tensor([0.5, -0.5, 1.5, -1.5]))
    assert alpha == 1.0
    assert codes.tolist() == [0, 0, 1, -1]
    codes, alpha = quantise(torch.zeros(3, 2))
    assert alpha == 1e-5
    assert not codes.any()


@given(st.integers(1, 5), st.integers(1, 17), st.integers(0, 2**32 - 1))
def test_packing_is_undone(rows: int, columns: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(-1, 2, (rows, columns))
    codes = torch.from_numpy(drawn).to(torch.int8)
    packed = pack(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, -(-columns // 4))
    assert torch.equal(unpack(packed, columns), codes)


def test_the_first_code_is_lowest() -> None:
    assert pack(torch.tensor([[1, 0, -1, 0, 1]])).tolist() == [[0b01_00_01_10, 0b01_01_01_10]]
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        pack(torch.tensor([2]))
