"""Discretisations of the reverse SDE dx = [f x - g^2 score] dt + g dw (2011.13456 eq. 6).

f and g^2 are infinite where alpha is 0 (cosine, straight path) and f dt, g^2 dt are large near it, so neither is used.
With f x - g^2 score / 2 = x0 alpha' + eps sigma' and g^2 dt = sigma^2 d(log SNR), both exact, the SDE reads
    dx = x0 dalpha + eps dsigma - sigma eps c / 2 + sigma sqrt(c) z,    c the step in log SNR,
in which everything is bounded but c.
"""

from itertools import pairwise

from torch import Tensor

from latentdiff.samplers.common import Callback, DenoiserLike, knots, report
from latentdiff.utils.random import Generators, randn_like

# The last two terms are a Langevin step: at any size c they keep the marginals, but discretised they turn a unit of
# variance into (1 - c/2)^2 + c = 1 + c^2/4.  No step takes c above this, that is: g is lowered where a coarse grid
# steps over more log SNR at once, at its noisy end above all (a factor 30 in alpha on the straight path).
MOST_LOG_SNR = 1.0


def euler_maruyama(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE, on the path: x_s = alpha_s x0 + sigma_s [(1 - c/2) eps + sqrt(c) z].

    c = log SNR_s - log SNR_t, at most 1.  As the grid is refined the step is x_t + [f x - g^2 score] dt + g sqrt(dt) z
    (tests/samplers/test_sampler_proofs.py), and `ancestral` to first order in c; sigma before the bracket is that of the step's
    end, so that a step to sigma = 0 lands on x0 (score_sde's denoising step).  Weak order 1.  It wants 50 steps or more.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].
    """
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen = denoiser(x, now.t)
        x = then.alpha * seen.x0 + then.sigma * seen.eps
        if then.sigma > 0:
            c = min(2 * (then.lam - now.lam), MOST_LOG_SNR)
            x = x - 0.5 * c * then.sigma * seen.eps + c**0.5 * then.sigma * randn_like(x, generator)
        x = report(callback, i, now.t, x, seen.x0)
    return x


def reverse_diffusion(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """The reverse diffusion sampler, 2011.13456 eq. 46: x_s = x_t - f_t(x_t) + G_t^2 score + G_t z.

    f_t and G_t are those of the forward chain x_t = x_s + f_t(x_s) + G_t z, here its exact transition from s to t:
    f_t(x) = (alpha_t/alpha_s - 1) x, G_t^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2.  This is algorithm 2's
    predictor on VE, algorithm 3's on VP and DDPM's schedules, and bounded on every other.  A step to sigma = 0 lands on
    x0.  Weak order 1; a step leaves noise of about sigma_t where sigma_s is meant, so it wants 100 steps or more.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].
    """
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen = denoiser(x, now.t)
        if then.sigma > 0:
            kept = now.alpha / then.alpha
            g2 = now.sigma**2 - (kept * then.sigma) ** 2
            x = (2 - kept) * x - g2 / now.sigma * seen.eps + g2**0.5 * randn_like(x, generator)
        else:
            x = then.alpha * seen.x0
        x = report(callback, i, now.t, x, seen.x0)
    return x
