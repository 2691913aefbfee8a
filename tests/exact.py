"""Closed forms: a mixture of isotropic Gaussians, of which everything about diffusion is known at every t."""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.schedules import NoiseSchedule
from latentdiff.tensors import per_sample


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
        """log(weight_k p_t(x | k)) [B, K], the offsets alpha m_k - x [B, K, D] and the variances [B, K]."""
        t = per_sample(t, x)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        flat, means = x.double().reshape(len(x), 1, -1), self.means.reshape(1, len(self.means), -1)
        offset = alpha[:, None, None] * means - flat  # [B, K, D]
        variance = alpha[:, None] ** 2 * self.stds**2 + sigma[:, None] ** 2  # [B, K]
        dims = flat.shape[-1]
        log_p = -0.5 * (offset**2).sum(-1) / variance - 0.5 * dims * torch.log(2 * torch.pi * variance)
        return self.weights.log() + log_p, offset, variance

    def log_prob(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """log p_t(x) in nats, [B]."""
        return torch.logsumexp(self.components(x, schedule, t)[0], dim=1)

    def posterior(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """p(k | x_t), [B, K]."""
        return torch.softmax(self.components(x, schedule, t)[0], dim=1)

    def score(self, x: Tensor, schedule: NoiseSchedule, t: float | Tensor) -> Tensor:
        """grad log p_t(x), in x's shape and dtype."""
        log_p, offset, variance = self.components(x, schedule, t)
        share = torch.softmax(log_p, dim=1)[..., None]
        return (share * offset / variance[..., None]).sum(1).reshape(x.shape).to(x.dtype)

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


def gaussian_flow(mean: Tensor, std: float, x: Tensor, schedule: NoiseSchedule, t: float, s: float) -> Tensor:
    """Where the probability-flow ODE of N(mean, std^2 I) takes x from t to s: (x - alpha m) / deviation is kept."""
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    deviation_t = (alpha_t**2 * std**2 + schedule.sigma(t) ** 2).sqrt()
    deviation_s = (alpha_s**2 * std**2 + schedule.sigma(s) ** 2).sqrt()
    return alpha_s * mean + deviation_s / deviation_t * (x - alpha_t * mean)
