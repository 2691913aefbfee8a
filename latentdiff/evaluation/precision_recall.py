"""Nearest neighbours, computed in blocks; with them precision, recall, density and coverage.

All rows are features of one space. Memory is that of one block of distances, however many rows there are.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 5  # k
BLOCK = 2048  # rows on each side of a block of distances


class PrecisionRecall(NamedTuple):
    """How two sets of features cover each other. Each set is described by balls that reach to the k-th neighbour in the set.

    Attributes:
        precision: share of samples in a ball of a real image ("Improved Precision and Recall", arXiv 1904.06991, eq. 1-2).
        recall: share of real images in a ball of a sample.
        density: mean number of balls of real images that a sample lies in, divided by k ("Reliable Fidelity and Diversity
            Metrics", arXiv 2002.09797, eq. 3-4). About 1 for real images; it may be larger than 1.
        coverage: share of real images whose own ball holds a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, samples: Tensor, k: int = NEIGHBOURS, block: int = BLOCK) -> PrecisionRecall:
    """Precision, recall, density and coverage of samples [M, D] against real images [N, D], in float64.

    ValueError where a set has k rows or fewer. block: rows on each side of a block of distances; it changes memory only.
    """
    centre = real.double().mean(dim=0)
    real, samples = real.double() - centre, samples.double() - centre  # far from zero, squares would cancel
    real_radius, sample_radius = (neighbour_radii(rows, k, block) for rows in (real, samples))  # squared; [N], [M]
    balls = torch.zeros(len(samples), dtype=torch.int64)  # of real images that each sample lies in
    recalled = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for i in _slices(len(real), block):
        for j in _slices(len(samples), block):
            distance = squared_distances(real[i], samples[j])  # [b, b']
            inside = distance <= real_radius[i, None]
            balls[j] += inside.sum(dim=0)
            covered[i] |= inside.any(dim=1)
            recalled[i] |= (distance <= sample_radius[None, j]).any(dim=1)
    counts = balls.double()
    return PrecisionRecall(
        precision=(counts > 0).double().mean().item(),
        recall=recalled.double().mean().item(),
        density=counts.mean().item() / k,
        coverage=covered.double().mean().item(),
    )


def neighbour_radii(rows: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """Squared distance of each of the rows [N, D] to its k-th nearest other row, float64 [N]. ValueError for k >= N."""
    if not 0 < k < len(rows):
        raise ValueError(f"{len(rows)} rows have no {k} neighbours each")
    radii = []
    for i in _slices(len(rows), block):
        best = torch.empty(len(rows[i]), 0, dtype=torch.float64)
        for j in _slices(len(rows), block):
            distance = torch.cat([best, squared_distances(rows[i], rows[j])], dim=1)
            best = distance.topk(min(k + 1, distance.shape[1]), dim=1, largest=False).values  # the row itself is one
        radii.append(best.amax(dim=1))
    return torch.cat(radii)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of rows [m, D] and [n, D] as [m, n], at least 0, in their dtype."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None]
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def nearest_rows(queries: Tensor, references: Iterable[Tensor], block: int = BLOCK) -> Tensor:
    """The index of the reference row that is nearest to each query [Q, D]; int64 [Q]. Computed in the queries' dtype.

    Distances are left to the caller: as a difference of the pair they have none of a matrix product's rounding.

    Args:
        queries: rows.
        references: rows in successive parts [b, D]; indices count through all parts.
        block: queries in a block of distances.
    """
    best = torch.full((len(queries),), torch.inf, dtype=queries.dtype)
    where = torch.zeros(len(queries), dtype=torch.int64)
    start = 0
    for part in references:
        part = part.to(queries.dtype)
        squares = part.square().sum(dim=1)[None]  # |q|^2 is the same for all references
        for i in _slices(len(queries), block):
            value, index = torch.addmm(squares, queries[i], part.T, alpha=-2).min(dim=1)
            closer = value < best[i]
            best[i] = torch.where(closer, value, best[i])
            where[i] = torch.where(closer, index + start, where[i])
        start += len(part)
    return where


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
