"""Nearest neighbours in blocks, and what is counted with them: precision, recall, density, coverage.

All rows are features of one space.  Memory is that of one block of distances, however many rows there are.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 5
BLOCK = 2048  # rows a side of a block


class PrecisionRecall(NamedTuple):
    """How two sets of features cover each other, each by balls to the k-th neighbour within a set; shares but for density.

    precision, recall: samples in a ball of a real image, real images in a ball of a sample (1904.06991 eq. 1-2).
    density, coverage: balls of real images that a sample lies in, in units of k; real images whose own ball holds a
    sample (2002.09797 eq. 3-4). Density of real images is 1 on average and may exceed it.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(real: Tensor, samples: Tensor, k: int = NEIGHBOURS, block: int = BLOCK) -> PrecisionRecall:
    """Precision, recall, density and coverage of samples [M, D] against real images [N, D], in float64.

    ValueError where a set has no k neighbours.
    """
    centre = real.double().mean(dim=0)
    real, samples = real.double() - centre, samples.double() - centre  # far from zero, squares would cancel
    real_radius, sample_radius = (neighbour_radii(rows, k, block) for rows in (real, samples))  # squared; [N], [M]
    balls = torch.zeros(len(samples), dtype=torch.int64)  # of real images that each sample lies in
    found = torch.zeros(len(real), dtype=torch.bool)
    covered = torch.zeros(len(real), dtype=torch.bool)
    for i in _slices(len(real), block):
        for j in _slices(len(samples), block):
            distance = squared_distances(real[i], samples[j])  # [b, b']
            inside = distance <= real_radius[i, None]
            balls[j] += inside.sum(dim=0)
            covered[i] |= inside.any(dim=1)
            found[i] |= (distance <= sample_radius[None, j]).any(dim=1)
    counts = balls.double()
    return PrecisionRecall(
        (counts > 0).double().mean().item(),
        found.double().mean().item(),
        counts.mean().item() / k,
        covered.double().mean().item(),
    )


def neighbour_radii(rows: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """Squared distance of each of the rows [N, D] to its k-th nearest other row, float64 [N]."""
    if not 0 < k < len(rows):
        raise ValueError(f"{len(rows)} rows have no {k} neighbours each")
    found = []
    for i in _slices(len(rows), block):
        best = torch.empty(len(rows[i]), 0, dtype=torch.float64)
        for j in _slices(len(rows), block):
            distance = torch.cat([best, squared_distances(rows[i], rows[j])], dim=1)
            best = distance.topk(min(k + 1, distance.shape[1]), dim=1, largest=False).values  # the row itself is one
        found.append(best.amax(dim=1))
    return torch.cat(found)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2 of rows [m, D] and [n, D] as [m, n], at least 0, in their type."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None]
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)


def nearest_rows(queries: Tensor, references: Iterable[Tensor], block: int = BLOCK) -> Tensor:
    """Which row of the references, given in parts [b, D] one after the other, is nearest to each query [Q, D]; int64 [Q].

    In the queries' type. Distances are left to the caller, who can take them from the pair found: as a difference, which
    a matrix product's rounding does not touch.
    """
    best = torch.full((len(queries),), torch.inf, dtype=queries.dtype)
    where = torch.zeros(len(queries), dtype=torch.int64)
    start = 0
    for part in references:
        part = part.to(queries.dtype)
        squares = part.square().sum(dim=1)[None]  # |q|^2 is the same for all
        for i in _slices(len(queries), block):
            value, index = torch.addmm(squares, queries[i], part.T, alpha=-2).min(dim=1)
            closer = value < best[i]
            best[i] = torch.where(closer, value, best[i])
            where[i] = torch.where(closer, index + start, where[i])
        start += len(part)
    return where


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
