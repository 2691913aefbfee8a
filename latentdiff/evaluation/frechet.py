"""Mean and covariance of features in one streaming pass, and the Fréchet distance between two of them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.data.shuffling import permutation


class Moments:
    """Streaming mean [D] and unbiased covariance [D, D] of rows, accumulated in float64.

    The update is Chan, Golub & LeVeque's pairwise one: it keeps centred sums, so that a large common mean costs
    no precision and the result does not depend on how the rows were cut into batches or shared out to processes.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def update(self, rows: Tensor) -> "Moments":
        """Add rows [n, D]; returns self."""
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"expected rows [n, {len(self.mean)}], got {list(rows.shape)}")
        if len(rows) == 0:
            return self
        rows = rows.detach().to("cpu", torch.float64)
        mean = rows.mean(dim=0)  # [D]
        centred = rows - mean
        return self._absorb(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Add everything other has seen (another process' share, say); returns self."""
        return self._absorb(other.count, other.mean, other._scatter)

    def _absorb(self, count: int, mean: Tensor, scatter: Tensor) -> "Moments":
        total = self.count + count
        if total == 0:
            return self
        shift = mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance [D, D], float64.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, got {self.count}")
        return self._scatter / (self.count - 1)

    @property
    def scatter(self) -> Tensor:
        """Sum of (x - mean)(x - mean)^T, [D, D]: what `of` takes."""
        return self._scatter

    @classmethod
    def of(cls, count: int, mean: Tensor, scatter: Tensor) -> "Moments":
        """Moments that were taken before."""
        moments = cls(len(mean))
        moments.count, moments.mean, moments._scatter = count, mean.double(), scatter.double()
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with the moments of a and b (1706.08500 eq. 6).

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^{1/2}), at least 0, in squared units of the features. The trace of
    the root is the sum of root eigenvalues of the symmetric C_a^{1/2} C_b C_a^{1/2}, which is right for singular
    covariances too (fewer rows than dimensions) and needs no offset on the diagonal.
    """
    return frechet_distance_to(a)(b)


def frechet_distance_to(a: Moments) -> Callable[[Moments], float]:
    """frechet_distance(a, b) as a function of b, where many are measured against one a: its root is taken once."""
    root = _symmetric_root(a.covariance)  # [D, D]

    def distance(b: Moments) -> float:
        eigenvalues = torch.linalg.eigvalsh(root @ b.covariance @ root)
        cross = eigenvalues.clamp(min=0).sqrt().sum()
        squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
        return max(0.0, squared.item())

    return distance


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The positive semi-definite square root of a symmetric PSD matrix; rounding below zero is cut."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance of two sets of features [N, D] and [M, D], symmetric in its arguments."""
    moments = [Moments(f.shape[-1]).update(f) for f in (features_a, features_b)]
    return frechet_distance(*moments)


PARTS = (1, 2, 3, 4, 5)


ROWS_A_DIMENSION = 2  # of the smallest part at least: with fewer, the covariance is far from the line's regime


FOLDS = 10


class Extrapolation(NamedTuple):
    """The limit at 1/N = 0, its standard error over the samples, and the mean sizes of the parts that the line goes through."""

    value: float
    stderr: float
    sizes: tuple[int, ...]


def extrapolate_frechet(samples: Tensor, reference: Moments, seed: int = 0) -> Extrapolation | None:
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
    measure = frechet_distance_to(reference)
    value = _limit(samples, place, parts, measure)
    kept = [group != fold for fold in range(FOLDS)]
    without = torch.tensor([_limit(samples[rows], place[rows], parts, measure) for rows in kept], dtype=torch.float64)
    stderr = ((FOLDS - 1) / FOLDS * (without - without.mean()).square().sum()).sqrt().item()
    return Extrapolation(value, stderr, tuple(N // m for m in parts))


def smallest_sample(dim: int) -> int:
    """The number of samples of D = dim features from which on `extrapolate_frechet` gives a value."""
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
