"""Discretisations of the reverse SDE dx = [f x - g^2 score] dt + g dw (Score SDE, arXiv 2011.13456, eq. 6).

f and g^2 are infinite where alpha is 0 (cosine, straight path), and f dt and g^2 dt are large near it, so neither is computed.
With f x - g^2 score / 2 = x0 alpha' + eps sigma' and g^2 dt = sigma^2 d(log SNR), both exact, the SDE is
    dx = x0 dalpha + eps dsigma - sigma eps c / 2 + sigma sqrt(c) z,    c the step in log SNR,
in which everything but c is bounded.
"""

from itertools import pairwise

from torch import Tensor

from latentdiff.samplers.common import Callback, DenoiserLike, apply_callback, grid_points
from latentdiff.utils.random import Generators, randn_like

# The last two terms are a Langevin step. In continuous time they keep the marginals at any c. Discretised they turn a variance
# of 1 into (1 - c/2)^2 + c = 1 + c^2/4. So c is limited to this: g is smaller where one step of a coarse grid covers more
# log SNR, mostly at the noisy end (a factor 30 in alpha on the straight path)
MOST_LOG_SNR = 1.0


def euler_maruyama(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE, along the path: x_s = alpha_s x0 + sigma_s [(1 - c/2) eps + sqrt(c) z].

    c = log SNR_s - log SNR_t, at most 1. On fine grids the step is x_t + [f x - g^2 score] dt + g sqrt(dt) z
    (tests/samplers/test_sampler_proofs.py), and `ancestral` to first order in c. The sigma before the bracket is that at the
    end of the step, so a step to sigma = 0 ends on x0. Weak order 1, one evaluation of the denoiser a step; use 50 steps or
    more.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.

    Returns:
        The state [B, ...] at grid[-1].
    """
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out = denoiser(x, now.t)
        x = then.alpha * out.x0 + then.sigma * out.eps
        if then.sigma > 0:
            c = min(2 * (then.lam - now.lam), MOST_LOG_SNR)
            x = x - 0.5 * c * then.sigma * out.eps + c**0.5 * then.sigma * randn_like(x, generator)
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x


def reverse_diffusion(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """The reverse diffusion sampler (Score SDE, arXiv 2011.13456, eq. 46): x_s = x_t - f_t(x_t) + G_t^2 score + G_t z.

    f_t and G_t are those of the forward chain x_t = x_s + f_t(x_s) + G_t z, here its exact transition from s to t: f_t(x) =
    (alpha_t/alpha_s - 1) x and G_t^2 = sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2. This is the predictor of the paper's
    algorithm 2 on VE and of algorithm 3 on VP and DDPM's schedules, and it is bounded on every other. A step to sigma = 0 ends
    on x0. Weak order 1, one evaluation of the denoiser a step. A step leaves noise of about sigma_t instead of sigma_s: use 100
    steps or more.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.

    Returns:
        The state [B, ...] at grid[-1].
    """
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out = denoiser(x, now.t)
        if then.sigma > 0:
            kept = now.alpha / then.alpha
            g2 = now.sigma**2 - (kept * then.sigma) ** 2
            x = (2 - kept) * x - g2 / now.sigma * out.eps + g2**0.5 * randn_like(x, generator)
        else:
            x = then.alpha * out.x0
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x
