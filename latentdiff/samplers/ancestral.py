"""DDPM and DDIM: one step from x_t to x_s, given the estimates of x0 and eps at t."""

from itertools import pairwise

from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.samplers.common import Callback, DenoiserLike, apply_callback, grid_points
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
    """DDIM (arXiv 2010.02502, eq. 12 and 16): x_s = alpha_s x0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z, a step from t to s.

    v = eta^2 (sigma_s/sigma_t)^2 (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2). One evaluation of the denoiser a step.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.
        eta: 0 is deterministic; 1 draws from the posterior q(x_s | x_t, x0).

    Returns:
        The state [B, ...] at grid[-1].

    Raises:
        UserError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta: between 0 and 1, not {eta}")
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out = denoiser(x, now.t)
        kept = (now.alpha * then.sigma) / (then.alpha * now.sigma)  # sqrt(SNR_t / SNR_s), in [0, 1]
        variance = eta**2 * then.sigma**2 * (1 - kept**2)
        x = then.alpha * out.x0 + (then.sigma**2 - variance) ** 0.5 * out.eps
        if variance > 0:
            x = x + variance**0.5 * randn_like(x, generator)
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x


def ancestral(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    variance: str = "small",
) -> Tensor:
    """DDPM (arXiv 2006.11239, algorithm 2) on any grid: x_s is drawn around the mean of q(x_s | x_t, x0).

    One evaluation of the denoiser a step. A step to sigma = 0 draws nothing, like the algorithm's last.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.
        variance: of the noise drawn, the two choices of section 3.2 of the paper.
            "small": beta-tilde, that of q(x_s | x_t, x0); right where x0 is known. This is `ddim` at eta = 1.
            "large": beta on a variance-preserving schedule. On any schedule, of x_s given x_t for data of N(0, I), for which
                it is right with any number of steps: (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) (alpha_s^2 + sigma_s^2) /
                (alpha_t^2 + sigma_t^2).

    Returns:
        The state [B, ...] at grid[-1].

    Raises:
        UserError: another variance.
    """
    if variance not in VARIANCES:
        raise UserError(f"variance: {variance!r} is unknown; valid: {', '.join(VARIANCES)}")
    if variance == "small":
        return ddim(denoiser, x, grid, generator, callback, eta=1.0)
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out = denoiser(x, now.t)
        kept = (now.alpha * then.sigma) / (then.alpha * now.sigma)  # sqrt(SNR_t / SNR_s), in [0, 1]
        x = then.alpha * out.x0 + kept * then.sigma * out.eps  # the mean of q(x_s | x_t, x0)
        if then.sigma > 0:
            added = now.sigma**2 * (1 - kept**2)  # by the forward process from s to t
            large = added * (then.alpha**2 + then.sigma**2) / (now.alpha**2 + now.sigma**2)
            x = x + large**0.5 * randn_like(x, generator)
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x
