"""Kernel Inception distance (KID): the squared maximum mean discrepancy with a polynomial kernel, without bias.

"Demystifying MMD GANs", arXiv 1801.01401.
"""

import torch
from torch import Tensor

from latentdiff.data.shuffling import permutation

SUBSETS, SUBSET_SIZE = 100, 1000


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """(a.b / D + 1)^3 of rows [m, D] and [n, D] as [m, n] (arXiv 1801.01401, section 4)."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of MMD^2 from rows [m, D] and [n, D], in float64 (arXiv 1801.01401, eq. 4).

    It may be negative. ValueError for fewer than two rows on a side.
    """
    x, y = x.double(), y.double()
    m, n = len(x), len(y)
    if min(m, n) < 2:
        raise ValueError(f"a kernel distance needs at least 2 rows a side, got {m} and {n}")
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(within[0] + within[1] - 2 * kernel(x, y).mean())


def kernel_distance(
    samples: Tensor, reference: Tensor, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET_SIZE
) -> tuple[float, float]:
    """Mean and standard deviation of MMD^2 over random subsets of samples [M, D] and reference [N, D].

    Each subset is drawn without replacement. The subsets of the reference depend on (N, seed) alone, so that all sets of
    samples meet the same ones.

    Args:
        samples: features of the samples.
        reference: features of the reference.
        seed: draws the subsets.
        subsets: how many.
        size: rows in a subset, at most as many as the smaller set has.
    """
    size = min(size, len(samples), len(reference))
    values = [
        squared_mmd(
            samples[permutation(len(samples), seed, "kernel samples", k)[:size]],
            reference[permutation(len(reference), seed, "kernel reference", k)[:size]],
        )
        for k in range(subsets)
    ]
    distances = torch.tensor(values, dtype=torch.float64)
    return distances.mean().item(), distances.std(correction=1).item() if subsets > 1 else 0.0
