"""Closed forms: a mixture of isotropic Gaussians, of which everything about diffusion is known at every t."""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample


@dataclass(frozen=True)
class Mixture:
    """p(x0) = sum_k weights[k] N(means[k], stds[k]^2 I) over samples of shape means.shape[1:]; float64.

    Under x_t = alpha x0 + sigma eps it stays one: means alpha m_k, variances alpha^2 s_k^2 + sigma^2.
    """

    weights: Tensor  # [K]
    means: Tensor  # [K, ...]
    stds: Tensor  # [K]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x0 [n, ...], component [n])."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k].reshape(-1, *(1,) * (noise.ndim - 1)) * noise, k

    def components(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log(weight_k p_t(x | k)) [B, K], alpha [B, 1] and the variances [B, K]; [1, ...] where t is one for all."""
        t = per_sample(t, x)
        t = t[:1] if t.stride(0) == 0 else t  # saves the tests much time
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        flat, means = x.double().reshape(len(x), -1), self.means.reshape(len(self.means), -1)
        square = (flat * flat).sum(1, keepdim=True) - 2 * alpha * (flat @ means.T) + alpha**2 * (means**2).sum(1)  # [B, K]
        variance = alpha**2 * self.stds**2 + sigma**2
        log_p = -0.5 * square / variance - 0.5 * flat.shape[1] * torch.log(2 * torch.pi * variance)
        return self.weights.log() + log_p, alpha, variance

    def log_prob(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """log p_t(x) in nats, [B]."""
        return torch.logsumexp(self.components(x, schedule, t)[0], dim=1)

    def posterior(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """p(k | x_t), [B, K]."""
        return torch.softmax(self.components(x, schedule, t)[0], dim=1)

    def score(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """grad log p_t(x), in x's shape and dtype."""
        log_p, alpha, variance = self.components(x, schedule, t)
        share = torch.softmax(log_p, dim=1) / variance  # [B, K]
        score = alpha * (share @ self.means.reshape(len(self.means), -1)) - share.sum(1, keepdim=True) * x.double().flatten(1)
        return score.reshape(x.shape).to(x.dtype)

    def only(self, k: int) -> "Mixture":
        """One component: the class-conditional density."""
        return Mixture(torch.ones(1, dtype=torch.float64), self.means[k : k + 1], self.stds[k : k + 1])

    def mean(self) -> Tensor:
        """E[x0], [...]."""
        return torch.tensordot(self.weights, self.means, dims=1)

    def variance(self) -> Tensor:
        """Var[x0] per dimension, [...]."""
        second = torch.tensordot(self.weights, self.means**2, dims=1) + (self.weights * self.stds**2).sum()
        return second - self.mean() ** 2


def mixture(shape: tuple[int, ...] = (2,)) -> Mixture:
    """Three components of uneven weight and width, of about unit variance, over samples of `shape`."""
    generator = torch.Generator().manual_seed(7)
    means = 0.9 * torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return Mixture(weights, means, torch.tensor([0.4, 0.25, 0.6], dtype=torch.float64))


def exact(schedule: NoiseSchedule, m: Mixture) -> Denoiser:
    """The denoiser of the mixture's exact score."""
    return Denoiser.from_score(lambda x, t: m.score(x, schedule, t), schedule)


def drawn(m: Mixture, n: int, seed: int = 0) -> Tensor:
    """x0 [n, ...] of the mixture."""
    return m.draw(n, torch.Generator().manual_seed(seed))[0]


def gaussian_flow(mean: Tensor, std: float, x: Tensor, schedule: NoiseSchedule, t: float, s: float) -> Tensor:
    """Where the probability-flow ODE of N(mean, std^2 I) takes x from t to s: (x - alpha m) / deviation is kept."""
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    deviation_t = (alpha_t**2 * std**2 + schedule.sigma(t) ** 2).sqrt()
    deviation_s = (alpha_s**2 * std**2 + schedule.sigma(s) ** 2).sqrt()
    return alpha_s * mean + deviation_s / deviation_t * (x - alpha_t * mean)


@dataclass(frozen=True)
class Gaussian:
    """p(x0) = N(mean, covariance) over flat samples [D], in float64; with a linear observation it stays one."""

    mean: Tensor  # [D]
    covariance: Tensor  # [D, D]

    def score(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """grad log p_t(x) [B, D] = (alpha^2 covariance + sigma^2)^-1 (alpha mean - x)."""
        t = per_sample(t, x)
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        spread = alpha[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * torch.eye(len(self.mean)).double()
        return torch.linalg.solve(spread, alpha * self.mean - x)

    def given(self, matrix: Tensor, y: Tensor, noise_std: float) -> "Gaussian":
        """p(x0 | y) for y [M] = matrix [M, D] x0 + noise_std n: Kalman's update."""
        spread = matrix @ self.covariance @ matrix.T + noise_std**2 * torch.eye(len(y)).double()
        gain = torch.linalg.solve(spread, matrix @ self.covariance).T  # [D, M]
        return Gaussian(self.mean + gain @ (y - matrix @ self.mean), self.covariance - gain @ matrix @ self.covariance)


def gaussian(dims: int = 4, seed: int = 3) -> Gaussian:
    """A correlated Gaussian of about unit variance."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn((dims, dims), generator=generator, dtype=torch.float64) / dims**0.5
    mean = 0.5 * torch.randn(dims, generator=generator, dtype=torch.float64)
    return Gaussian(mean, root @ root.T + 0.05 * torch.eye(dims).double())


def deviations(m: Mixture, x: Tensor, schedule: NoiseSchedule, t: float) -> Tensor:
    """z-scores of samples x [N, ...] against p_t: weight, mean and covariance of every component, [K (1 + D + D (D+1)/2)].

    With r = p(k | x) and u = (x - alpha m_k) / sqrt(alpha^2 s_k^2 + sigma^2), exactly under p_t
        E[r] = w_k,   E[r u_i] = 0,   E[r (u_i u_j - d_ij)] = 0   for every k and i <= j.
    Each mean over the N samples is divided by the square root of a bound on its variance, which is reached where the
    components do not overlap: w_k (1 - w_k), w_k and w_k (1 + d_ij), over N.  For x ~ p_t they are therefore standard
    normal or narrower, whatever D, schedule and t.
    """
    log_p, alpha, variance = m.components(x, schedule, t)
    r = torch.softmax(log_p, dim=1)  # [N, K]
    u = (x.flatten(1)[:, None] - alpha[..., None] * m.means.flatten(1)) / variance[..., None].sqrt()  # [N, K, D]
    n, w = len(x), m.weights
    weight = (r.mean(0) - w) / (w * (1 - w)).clamp_min(1e-300).sqrt() * (len(w) > 1)
    mean = torch.einsum("nk,nki->ki", r, u) / n / w[:, None].sqrt()
    eye = torch.eye(u.shape[-1], dtype=u.dtype)
    second = torch.einsum("nk,nki,nkj->kij", r, u, u) / n - r.mean(0)[:, None, None] * eye
    covariance = second / (w[:, None, None] * (1 + eye)).sqrt()
    above = torch.triu_indices(u.shape[-1], u.shape[-1])
    return n**0.5 * torch.cat([weight, mean.flatten(), covariance[:, above[0], above[1]].flatten()])
