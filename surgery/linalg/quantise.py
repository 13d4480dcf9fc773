"""Integers of few bits with a scale for every group of inputs.

M counts outputs, N inputs, G groups of consecutive inputs of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import InputError, UsageError

BITS = {"int8": 8, "int4": 4, "ternary": 2}
"""Bits that a code takes, by kind."""

SHRINKS = tuple(1 - 0.05 * step for step in range(9))
"""Fractions of the largest absolute value that are tried as the end of the range."""


@dataclass(frozen=True)
class Quantised:
    """codes [M, N] int64, zero in the middle, times ``scales_MG`` (float64) by groups of ``group`` inputs."""

    codes_MN: torch.Tensor
    scales_MG: torch.Tensor
    group: int
    bits: int

    def dense(self) -> torch.Tensor:
        """What it stands for, float64 [M, N]."""
        columns = self.codes_MN.shape[1]
        scales_MN = self.scales_MG.repeat_interleave(self.group, dim=1)[:, :columns]
        return self.codes_MN * scales_MN

    def rounded(self, dtype: torch.dtype) -> Quantised:
        """With scales as a type holds them."""
        scales_MG = self.scales_MG.to(dtype).double()
        return Quantised(self.codes_MN, scales_MG, self.group, self.bits)

    def packed(self) -> torch.Tensor:
        """Codes as unsigned integers, several a byte, the first in the lowest bits: uint8 [M, bytes]."""
        each = 8 // self.bits
        middle = 1 if self.bits == 2 else 2 ** (self.bits - 1)
        raised = self.codes_MN + middle
        raised = torch.nn.functional.pad(raised, (0, -raised.shape[1] % each), value=0)
        shifts = torch.arange(0, 8, self.bits)
        parts = raised.reshape(raised.shape[0], -1, each) << shifts
        return parts.sum(dim=2).to(torch.uint8)


def quantise(matrix_MN: torch.Tensor, kind: str, group: int) -> Quantised:
    """The nearest integers with the scale of every group chosen for least squares.

    For ``ternary`` the optimum is exact: the k largest absolute values of a group become +-scale, their mean, for the
    k that maximises (sum of them)^2 / k. For ``int8`` and ``int4`` the end of the symmetric range is the best of
    SHRINKS times the largest absolute value.

    Raises:
        UsageError: an unknown kind, or a group that is not positive.
        InputError: a value is not finite.
    """
    if kind not in BITS or group < 1:
        raise UsageError(f"cannot quantise to {kind!r} in groups of {group}")
    wide_MN = matrix_MN.double()
    if not bool(torch.isfinite(wide_MN).all()):
        raise InputError("a matrix to quantise holds a value that is not finite")
    rows, columns = wide_MN.shape
    padded = torch.nn.functional.pad(wide_MN, (0, -columns % group))
    grouped_MGK = padded.reshape(rows, -1, group)
    bits = BITS[kind]
    if kind == "ternary":
        codes_MGK, scales_MG = _ternary(grouped_MGK)
    else:
        codes_MGK, scales_MG = _integers(grouped_MGK, 2 ** (bits - 1) - 1)
    codes_MN = codes_MGK.reshape(rows, -1)[:, :columns].long()
    return Quantised(codes_MN, scales_MG, group, bits)


def _ternary(grouped_MGK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sizes, order = grouped_MGK.abs().sort(dim=2, descending=True, stable=True)
    sums = sizes.cumsum(dim=2)
    counts = torch.arange(1, sizes.shape[2] + 1, dtype=torch.float64)
    kept = (sums.square() / counts).argmax(dim=2, keepdim=True)
    scales = sums.gather(2, kept) / counts[kept]
    among = torch.arange(sizes.shape[2]) <= kept
    mask = torch.zeros_like(among).scatter(2, order, among)
    return grouped_MGK.sign() * mask, scales[:, :, 0]


def _integers(grouped_MGK: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    largest = grouped_MGK.abs().amax(dim=2, keepdim=True)
    best_codes = torch.zeros_like(grouped_MGK)
    best_scales = torch.zeros_like(largest)
    best_errors = torch.full_like(largest, float("inf"))
    for shrink in SHRINKS:
        scales = largest * shrink / top
        safe = torch.where(scales > 0, scales, 1.0)
        codes = (grouped_MGK / safe).round().clamp(-top, top)
        errors = (codes * scales - grouped_MGK).square().sum(dim=2, keepdim=True)
        better = errors < best_errors
        best_codes = torch.where(better, codes, best_codes)
        best_scales = torch.where(better, scales, best_scales)
        best_errors = torch.where(better, errors, best_errors)
    return best_codes, best_scales[:, :, 0]


def unpacked(
    codes_MB: torch.Tensor, scales_MG: torch.Tensor, group: int, bits: int, columns: int
) -> Quantised:
    """What :meth:`Quantised.packed` stored, of a matrix with N ``columns``: uint8 [M, bytes] and its scales."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    raised = (codes_MB[:, :, None] >> shifts) & (2**bits - 1)
    middle = 1 if bits == 2 else 2 ** (bits - 1)
    codes_MN = raised.flatten(1)[:, :columns].long() - middle
    return Quantised(codes_MN, scales_MG, group, bits)
