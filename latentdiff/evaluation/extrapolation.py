"""The Fréchet distance of infinitely many samples: its bias falls as 1/N, so a line through several N says where it ends.

1911.07023 section 3: the distance of N samples to a fixed reference is, but for terms of higher order, the limit plus a
constant over N. The reference's own bias stays: it is fixed, and the same for all that is measured against it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.data.shuffling import permutation
from latentdiff.evaluation.frechet import Moments, distance_from

PARTS = (1, 2, 3, 4, 5)
ROWS_A_DIMENSION = 2  # of the smallest part at least: with fewer, the covariance is far from the line's regime
FOLDS = 10


class Extrapolation(NamedTuple):
    """The limit at 1/N = 0, its standard error over the samples, and the mean sizes of the parts that the line goes through."""

    value: float
    stderr: float
    sizes: tuple[int, ...]


def extrapolate(samples: Tensor, reference: Moments, seed: int = 0) -> Extrapolation | None:
    """The Fréchet distance to reference that samples [N, D] would have if there were infinitely many.

    For m in PARTS all samples are shared out, by seed, to m parts, whose mean distance stands at 1/N = m/N: evenly spaced,
    each from all samples. The standard error is the jackknife's, of the whole fit without each of FOLDS groups of
    samples; the least squares' own would take points of the same samples for independent. It is of the samples alone.
    None where fewer than three m leave ROWS_A_DIMENSION D samples in a part.
    """
    N, D = samples.shape
    parts = [m for m in PARTS if N // m >= ROWS_A_DIMENSION * D]
    if len(parts) < 3:
        return None
    place = permutation(N, seed, "extrapolation").argsort()  # part: this modulo m, so that a group's absence moves nobody
    group = permutation(N, seed, "extrapolation groups").argsort() % FOLDS
    measure = distance_from(reference)
    value = _limit(samples, place, parts, measure)
    kept = [group != fold for fold in range(FOLDS)]
    without = torch.tensor([_limit(samples[rows], place[rows], parts, measure) for rows in kept], dtype=torch.float64)
    stderr = ((FOLDS - 1) / FOLDS * (without - without.mean()).square().sum()).sqrt().item()
    return Extrapolation(value, stderr, tuple(N // m for m in parts))


def fewest(dim: int) -> int:
    """The number of samples of D = dim features from which on `extrapolate` gives a value."""
    return PARTS[2] * ROWS_A_DIMENSION * dim


def _limit(samples: Tensor, place: Tensor, parts: list[int], measure: Callable[[Moments], float]) -> float:
    """Where the line through the mean distances of m parts, for each m, meets 1/N = 0."""
    across, up = [], []
    for m in parts:
        pieces = [samples[place % m == k] for k in range(m)]
        across.append(sum(1 / len(piece) for piece in pieces) / m)
        up.append(sum(measure(Moments(samples.shape[1]).update(piece)) for piece in pieces) / m)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (across, up))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() - slope * x.mean()).item()
