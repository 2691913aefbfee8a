"""DDPM and DDIM: one step from x_t to x_s, given the x0 and eps seen at t."""

from itertools import pairwise

from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.samplers.common import Callback, DenoiserLike, knots, report
from latentdiff.utils.random import Generators, randn_like

VARIANCES = ("small", "large")


def ddim(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (2010.02502 eq. 12 and 16): x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z.

    v = eta^2 (sigma_s/sigma_t)^2 (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2): eta = 0 is deterministic, eta = 1 draws
    from the posterior q(x_s | x_t, x0).
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].  UserError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta: between 0 and 1, not {eta}")
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen = denoiser(x, now.t)
        kept = (now.alpha * then.sigma) / (then.alpha * now.sigma)  # sqrt(SNR_t / SNR_s), in [0, 1]
        variance = eta**2 * then.sigma**2 * (1 - kept**2)
        x = then.alpha * seen.x0 + (then.sigma**2 - variance) ** 0.5 * seen.eps
        if variance > 0:
            x = x + variance**0.5 * randn_like(x, generator)
        x = report(callback, i, now.t, x, seen.x0)
    return x


def ancestral(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    variance: str = "small",
) -> Tensor:
    """DDPM (2006.11239 algorithm 2) on any grid: x_s drawn about the mean of q(x_s | x_t, x0).

    variance, the two choices of its section 3.2:
    - small: beta-tilde, that of q(x_s | x_t, x0) itself; right where x0 is known.  DDIM at eta 1.
    - large: beta on a variance-preserving schedule, in general that of x_s given x_t for data of N(0, I), for which it is
      right with any number of steps: (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) (alpha_s^2 + sigma_s^2) /
      (alpha_t^2 + sigma_t^2).  A step to sigma = 0 draws nothing, as the algorithm's last.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].  UserError for another variance.
    """
    if variance not in VARIANCES:
        raise UserError(f"variance: {variance!r} is unknown; valid: {', '.join(VARIANCES)}")
    if variance == "small":
        return ddim(denoiser, x, grid, generator, callback, eta=1.0)
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen = denoiser(x, now.t)
        kept = (now.alpha * then.sigma) / (then.alpha * now.sigma)  # sqrt(SNR_t / SNR_s), in [0, 1]
        x = then.alpha * seen.x0 + kept * then.sigma * seen.eps  # the mean of q(x_s | x_t, x0)
        if then.sigma > 0:
            added = now.sigma**2 * (1 - kept**2)  # by the forward process from s to t
            large = added * (then.alpha**2 + then.sigma**2) / (now.alpha**2 + now.sigma**2)
            x = x + large**0.5 * randn_like(x, generator)
        x = report(callback, i, now.t, x, seen.x0)
    return x
