"""Time and excess error of the truncation kernels beside LAPACK's and the usual randomised ones.

    python -m tests.benchmarks.lowrank [ROWS COLUMNS]

Prints process CPU seconds until the two factors are there (their product is not timed), the ratio to
``torch.linalg.svd``, and the excess over the optimal Frobenius error, for matrices with the spectrum of a language
model's feed-forward, rounded to bfloat16: 3584 x 1024 and 14336 x 4096, or one of the given shape. Set
OMP_NUM_THREADS=1: another number of threads spins.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence

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


Factors = tuple[torch.Tensor, torch.Tensor]


def lapack(weight: torch.Tensor, rank: int) -> Factors:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def torch_randomised(weight: torch.Tensor, rank: int) -> Factors:
    left, values, right = torch.svd_lowrank(weight, q=rank, niter=4)
    return left * values, right.T


def sklearn_randomised(weight: torch.Tensor, rank: int) -> Factors:
    from sklearn.utils.extmath import randomized_svd

    left, values, right = randomized_svd(weight.numpy(), rank, n_iter=4, random_state=0)
    return torch.from_numpy(left * values), torch.from_numpy(right)


def exact(weight: torch.Tensor, rank: int) -> Factors:
    found = truncate(weight, rank)
    return found.left_MR, found.right_RN


def sketch(weight: torch.Tensor, rank: int) -> Factors:
    found = truncate_randomised(weight, rank, np.random.default_rng(0))
    return found.left_MR, found.right_RN


KERNELS: dict[str, Callable[[torch.Tensor, int], Factors]] = {
    "torch.linalg.svd": lapack,
    "truncate": exact,
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
    """Measure every kernel at 5, 25 and 50 per cent of the full rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="*", type=int, metavar="ROWS COLUMNS")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.05, 0.25, 0.5])
    parser.add_argument("--repeats", type=int, default=3, help="the least time of these counts")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    shapes = [tuple(given.shape)] if given.shape else [(3584, 1024), (14336, 4096)]
    for rows, columns in shapes:
        measure(matrix(rows, columns), given.shares, given.repeats)


def measure(weight: torch.Tensor, shares: Sequence[float], repeats: int) -> None:
    """Print the table of one matrix."""
    total = float(weight.double().square().sum())
    wide = weight.double()
    values = torch.linalg.eigvalsh(wide.T @ wide if len(wide) >= wide.shape[1] else wide @ wide.T)
    values = values.flip(0).clamp_min(0).sqrt()
    floor, rate = flop_floor(weight)
    print(
        f"Gram matrix and tridiagonal form alone: {floor:.2f} s at {rate:.0f} Gflop/s of a product"
    )
    reference = 0.0
    for share in shares:
        rank = round(share * min(weight.shape))
        best = (total - float(values[:rank].square().sum())) ** 0.5
        print(f"rank {rank} of {tuple(weight.shape)}")
        for name, kernel in KERNELS.items():
            if reference and kernel is lapack:  # the same decomposition whatever the rank
                continue
            kernel(weight[:64, :64], 4)  # first calls load libraries
            spent, found = least(lambda k=kernel, r=rank: k(weight, r), repeats)
            reference = reference or spent
            lost = found[0].double() @ found[1].double() - weight.double()
            excess = float(lost.norm()) / best - 1
            print(
                f"  {name:24} {spent:7.3f} s  x{spent / reference:5.3f}  excess {excess:9.2e}",
                flush=True,
            )
        began = time.process_time()
        pack(*truncate(weight, rank).balanced())
        print(f"  truncate and pack into pivot form: {time.process_time() - began:.3f} s")


def least(call: Callable[[], Factors], repeats: int) -> tuple[float, Factors]:
    """The least CPU seconds of some calls, and what the last one gave."""
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        found = call()
        spent.append(time.process_time() - began)
    return min(spent), found


if __name__ == "__main__":
    main()
