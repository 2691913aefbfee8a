"""Single-step solvers of the probability-flow ODE, written along the path: dx = x0 dalpha + eps dsigma.

It is dx/dt = alpha' x0 + sigma' eps without reference to t: finite where alpha or sigma vanishes, and the solver Karras
et al. run in sigma on VE (2206.00364), a plain one in t on the straight path.
"""

from itertools import pairwise

from torch import Tensor

from latentdiff.rng import Generators
from latentdiff.samplers.common import Callback, DenoiserLike, knots, report


def euler(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method, order 1: x_s = x_t + (alpha_s - alpha_t) x0 + (sigma_s - sigma_t) eps.

    The same numbers as DDIM at eta 0 (2010.02502 section 4.3) and as diffusers' Euler schedulers.  Draws nothing.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].
    """
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen = denoiser(x, now.t)
        x = then.alpha * seen.x0 + then.sigma * seen.eps  # x_t = alpha_t x0 + sigma_t eps has cancelled
        x = report(callback, i, now.t, x, seen.x0)
    return x


def heun(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method, order 2, two evaluations a step: x0 and eps are averaged between t and Euler's guess at s.

    2206.00364 algorithm 1 without churn, on any path; like there, the step that ends on sigma = 0 is Euler's.
    Draws nothing.  x: the state [B, ...] at grid[0]; returns the state at grid[-1].
    """
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen = denoiser(x, now.t)
        guess = then.alpha * seen.x0 + then.sigma * seen.eps
        if then.sigma > 0:
            ahead = denoiser(guess, then.t)
            # x + (da) (x0 + x0')/2 + (ds) (eps + eps')/2, with x + da x0 + ds eps = guess.
            d_alpha, d_sigma = then.alpha - now.alpha, then.sigma - now.sigma
            guess = guess + 0.5 * d_alpha * (ahead.x0 - seen.x0) + 0.5 * d_sigma * (ahead.eps - seen.eps)
        x = report(callback, i, now.t, guess, seen.x0)
    return x
