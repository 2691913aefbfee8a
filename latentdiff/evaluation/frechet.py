"""Mean and covariance of features in one streaming pass, and the Fréchet distance between two of them."""

from collections.abc import Callable

import torch
from torch import Tensor


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
    return distance_from(a)(b)


def distance_from(a: Moments) -> Callable[[Moments], float]:
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
