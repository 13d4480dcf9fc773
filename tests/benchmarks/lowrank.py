"""Time and excess error of the truncation kernels beside LAPACK's and the usual randomised ones.

    python tests/benchmarks/lowrank.py [ROWS COLUMNS]

Prints process CPU seconds, the ratio to ``torch.linalg.svd``, and the excess over the optimal Frobenius error, for a
matrix with the spectrum of a language model's feed-forward, rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from moesurg.surgery.linalg.lowrank import truncate, truncate_randomised
from moesurg.surgery.linalg.pivot import pack


def matrix(rows: int, columns: int) -> torch.Tensor:
    """U diag(s) V^T with a flat bulk and a few large singular values."""
    generator = torch.Generator().manual_seed(0)
    small = min(rows, columns)
    place = torch.arange(1, small + 1)
    values = 0.35 * (1 - (place - 1) / small) + place**-0.7
    left, right = (
        torch.linalg.qr(torch.randn(size, small, generator=generator))[0]
        for size in (rows, columns)
    )
    return (left * values @ right.T).bfloat16().float()


def lapack(weight: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def torch_randomised(weight: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.svd_lowrank(weight, q=rank, niter=4)
    return left * values @ right.T


def sklearn_randomised(weight: torch.Tensor, rank: int) -> torch.Tensor:
    from sklearn.utils.extmath import randomized_svd

    left, values, right = randomized_svd(weight.numpy(), rank, n_iter=4, random_state=0)
    return torch.from_numpy(left * values @ right)


def sketch(weight: torch.Tensor, rank: int) -> torch.Tensor:
    return truncate_randomised(weight, rank, np.random.default_rng(0)).product()


KERNELS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "torch.linalg.svd": lapack,
    "truncate": lambda weight, rank: truncate(weight, rank).product(),
    "truncate_randomised": sketch,
    "torch.svd_lowrank": torch_randomised,
    "sklearn randomized_svd": sklearn_randomised,
}


def flop_floor(weight: torch.Tensor) -> tuple[float, float]:
    """CPU seconds that m n^2 + 4/3 n^3 operations would take at the rate of a float32 product of NumPy's, and the rate.

    What an exact decomposition through the Gram matrix has to do at least, if all of it ran as fast as a product.
    """
    tall = (weight if weight.shape[0] >= weight.shape[1] else weight.T).numpy()
    rows, columns = tall.shape
    began = time.process_time()
    tall.T @ tall
    rate = 2 * rows * columns**2 / (time.process_time() - began)
    return (rows * columns**2 + 4 / 3 * columns**3) / rate, rate / 1e9


def main() -> None:
    """Measure every kernel at 5 and 25 per cent of the full rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="?", type=int, default=3584)
    parser.add_argument("columns", nargs="?", type=int, default=1024)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    weight = matrix(given.rows, given.columns)
    total = float(weight.double().square().sum())
    values = torch.linalg.svdvals(weight.double())
    floor, rate = flop_floor(weight)
    print(
        f"Gram matrix and tridiagonal form alone: {floor:.2f} s at {rate:.0f} Gflop/s of a product"
    )
    for share in (0.05, 0.25):
        rank = round(share * min(weight.shape))
        best = (total - float(values[:rank].square().sum())) ** 0.5
        print(f"rank {rank} of {tuple(weight.shape)}")
        reference = 0.0
        for name, kernel in KERNELS.items():
            kernel(weight[:64, :64], 4)  # first calls load libraries
            began = time.process_time()
            found = kernel(weight, rank)
            spent = time.process_time() - began
            reference = reference or spent
            excess = float((found.double() - weight.double()).norm()) / best - 1
            print(f"  {name:24} {spent:7.2f} s  x{spent / reference:5.2f}  excess {excess:9.2e}")
    began = time.process_time()
    pack(*truncate(weight, rank).balanced())
    print(f"truncate and pack into pivot form: {time.process_time() - began:.2f} s")


if __name__ == "__main__":
    main()
