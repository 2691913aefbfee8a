"""The Fréchet distance between two sets of features, and what it would be with infinitely many samples."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.data.shuffling import permutation

# The extrapolation splits the samples into so many equal parts
PARTS = (1, 2, 3, 4, 5)
ROWS_A_DIMENSION = 2  # in the smallest part, at least: with fewer the covariance is too poor for the linear fit
FOLDS = 10  # of the jackknife


class Moments:
    """Streaming mean [D] and unbiased covariance [D, D] of rows, in float64.

    The update is the pairwise one of Chan, Golub & LeVeque. It keeps centred sums, so a large common mean costs no
    precision. The result does not depend on how the rows are cut into batches or shared out to processes.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, count: int, mean: Tensor, scatter: Tensor) -> "Moments":
        """Moments from their parts: number of rows, mean [D], and scatter [D, D] as in the attribute of that name."""
        moments = cls(len(mean))
        moments.count, moments.mean, moments.scatter = count, mean.double(), scatter.double()
        return moments

    def update(self, rows: Tensor) -> "Moments":
        """Add rows [n, D]; return self. ValueError for another shape."""
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"expected rows [n, {len(self.mean)}], got {list(rows.shape)}")
        if len(rows) == 0:
            return self
        rows = rows.detach().to("cpu", torch.float64)
        mean = rows.mean(dim=0)  # [D]
        centred = rows - mean
        return self.merge(Moments.of(len(rows), mean, centred.T @ centred))

    def merge(self, other: "Moments") -> "Moments":
        """Add the rows of other moments, such as another process' share; return self."""
        total = self.count + other.count
        if total == 0:
            return self
        shift = other.mean - self.mean
        self.scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * other.count / total)
        self.mean = self.mean + shift * (other.count / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance, float64 [D, D]. ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the moments of a and b.

    "GANs Trained by a Two Time-Scale Update Rule", arXiv 1706.08500, eq. 6:

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2})

    At least 0, in squared units of the features. With Inception's features this is FID. The trace of the root is the sum
    of the root eigenvalues of the symmetric C_a^{1/2} C_b C_a^{1/2}. This is right for singular covariances too (fewer
    rows than dimensions) and needs no offset on the diagonal.
    """
    return frechet_distance_to(a)(b)


def frechet_distance_to(a: Moments) -> Callable[[Moments], float]:
    """frechet_distance(a, b) as a function of b. The root of a's covariance is computed once for many b."""
    root = _symmetric_root(a.covariance)  # [D, D]

    def distance(b: Moments) -> float:
        eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root)
        cross = eigenvalues.clamp(min=0).sqrt().sum()
        squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
        return max(0.0, squared.item())

    return distance


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D]; symmetric in its arguments."""
    moments = [Moments(features.shape[-1]).update(features) for features in (features_a, features_b)]
    return frechet_distance(*moments)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The positive semi-definite square root of a symmetric PSD matrix; eigenvalues rounded below zero become zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class Extrapolation(NamedTuple):
    """Result of `extrapolate_frechet` ("Effectively Unbiased FID", arXiv 1911.07023).

    Attributes:
        value: the Fréchet distance for infinitely many samples, in squared units of the features. It may be a little below 0.
        stderr: its standard error over the samples, in the same units.
        sizes: the numbers of samples at which the line is fitted, the largest first.
    """

    value: float
    stderr: float
    sizes: tuple[int, ...]


def extrapolate_frechet(samples: Tensor, reference: Moments, seed: int = 0) -> Extrapolation | None:
    """The Fréchet distance to a reference that samples [N, D] would have if there were infinitely many.

    The distance of N samples to a fixed reference is the limit plus a constant over N, up to terms of higher order
    ("Effectively Unbiased FID", arXiv 1911.07023, section 3). So a line is fitted through several N. For each m of PARTS
    all samples are divided into m parts by seed, and the parts' mean distance is a point at 1/N = m/N. The reference's own
    bias stays: it is the same for all that is compared with this reference.

    The standard error is the jackknife's over FOLDS groups of samples. The regression's own standard error is invalid,
    because its points share samples.

    Returns:
        None where fewer than three m leave ROWS_A_DIMENSION * D samples in a part.
    """
    N, D = samples.shape
    parts = [m for m in PARTS if N // m >= ROWS_A_DIMENSION * D]
    if len(parts) < 3:
        return None
    # A sample's part is its place modulo m, so leaving a group out moves no other sample to another part
    place = permutation(N, seed, "extrapolation").argsort()
    group = permutation(N, seed, "extrapolation groups").argsort() % FOLDS
    distance = frechet_distance_to(reference)
    value = _limit(samples, place, parts, distance)
    kept = [group != fold for fold in range(FOLDS)]
    without = torch.tensor([_limit(samples[rows], place[rows], parts, distance) for rows in kept], dtype=torch.float64)
    stderr = ((FOLDS - 1) / FOLDS * (without - without.mean()).square().sum()).sqrt().item()
    return Extrapolation(value, stderr, tuple(N // m for m in parts))


def smallest_sample(dim: int) -> int:
    """The number of samples that `extrapolate_frechet` needs for features of this dimension."""
    return PARTS[2] * ROWS_A_DIMENSION * dim


def _limit(samples: Tensor, place: Tensor, parts: list[int], distance: Callable[[Moments], float]) -> float:
    """The value at 1/N = 0 of the least-squares line through the mean distances of m parts, for each m."""
    inverse_sizes, distances = [], []
    for m in parts:
        pieces = [samples[place % m == k] for k in range(m)]
        inverse_sizes.append(sum(1 / len(piece) for piece in pieces) / m)
        distances.append(sum(distance(Moments(samples.shape[1]).update(piece)) for piece in pieces) / m)
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (inverse_sizes, distances))
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() - slope * x.mean()).item()
