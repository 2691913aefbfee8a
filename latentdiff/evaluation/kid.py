"""Kernel distance (KID, 1801.01401): the squared maximum mean discrepancy with a polynomial kernel, without bias."""

import torch
from torch import Tensor

from latentdiff.data.shuffling import permutation

SUBSETS, SUBSET = 100, 1000


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3 of rows [m, D] and [n, D] as [m, n] (1801.01401 section 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of MMD^2 from rows [m, D] and [n, D], in float64 (1801.01401 eq. 4); it may be negative."""
    x, y = x.double(), y.double()
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"a kernel distance needs at least 2 rows a side, got {m} and {n}")
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


def kernel_distance(
    samples: Tensor, reference: Tensor, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET
) -> tuple[float, float]:
    """(mean, standard deviation) of MMD^2 over seeded subsets of samples [M, D] and reference [N, D].

    size: of a subset, or as many as the smaller set has. Subsets are drawn without replacement, each anew; those of the
    reference depend on (N, seed) alone, so that the same ones meet any samples.
    """
    size = min(size, len(samples), len(reference))
    values = [
        squared_mmd(
            samples[permutation(len(samples), seed, "kernel samples", k)[:size]],
            reference[permutation(len(reference), seed, "kernel reference", k)[:size]],
        )
        for k in range(subsets)
    ]
    found = torch.tensor(values, dtype=torch.float64)
    return found.mean().item(), found.std(correction=1).item() if subsets > 1 else 0.0
