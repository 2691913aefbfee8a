"""Single-step solvers of the probability-flow ODE, written along the path: dx = x0 dalpha + eps dsigma.

It is dx/dt = alpha' x0 + sigma' eps without reference to t: finite where alpha or sigma vanishes, and the solver Karras
et al. run in sigma on VE (2206.00364), a plain one in t on the straight path.  The grid may also rise, from data to noise.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.samplers.common import Callback, DenoiserLike, Knot, knots, look, report
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.random import Generators, randn_like


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
        seen = look(denoiser, x, now)
        x = then.alpha * seen.x0 + then.sigma * seen.eps  # x_t = alpha_t x0 + sigma_t eps has cancelled
        x = report(callback, i, now.t, x, seen.x0)
    return x


def heun(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    variable: str = "path",
) -> Tensor:
    """Heun's method, order 2, two evaluations a step: x0 and eps are averaged between t and Euler's guess at s.

    2206.00364 algorithm 2 on any path; like there, the step that ends on sigma = 0 is Euler's.
    variable: "path" steps x along (alpha, sigma), diffusers' FlowMatchHeun on the straight path; "ratio" steps x / alpha
    along sigma / alpha, diffusers' HeunDiscrete on DDPM's schedules.  Both are Karras et al.'s where alpha is 1; elsewhere
    "path" errs less, on a Gaussian mixture by 7 on VP and 38 on the straight path at 10 steps.
    s_churn: before each of the n steps, noise is added up to (1 + min(s_churn/n, sqrt(2) - 1)) sigma/alpha, but not
    beyond that of t_max.  s_tmin, s_tmax: only where sigma/alpha (the paper's sigma) is between them.  s_noise: the
    standard deviation of the noise added.  Draws nothing at s_churn = 0.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].  UserError for an option out of range.
    """
    if not (s_churn >= 0 and s_noise >= 0 and 0 <= s_tmin <= s_tmax):
        raise UserError("heun: s_churn and s_noise must be at least 0, and 0 <= s_tmin <= s_tmax")
    if variable not in ("path", "ratio"):
        raise UserError(f"variable: {variable!r} is unknown; valid: path, ratio")
    if variable == "ratio" and float(denoiser.schedule.alpha(grid).min()) == 0:
        raise UserError("variable: there is no ratio sigma / alpha where alpha is 0; start below t = 1 or take path")
    gamma = min(s_churn / (len(grid) - 1), math.sqrt(2) - 1)
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        raised = _raised(denoiser.schedule, now, gamma, s_tmin, s_tmax)
        if raised is not None:
            # x / alpha holds noise of sigma / alpha: what is added to it is the difference of the variances.
            added = math.sqrt((raised.sigma / raised.alpha) ** 2 - (now.sigma / now.alpha) ** 2)
            x = raised.alpha * (x / now.alpha + added * s_noise * randn_like(x, generator))
            now = raised
        seen = look(denoiser, x, now)
        guess = then.alpha * seen.x0 + then.sigma * seen.eps
        if then.sigma > 0:
            ahead = denoiser(guess, then.t)
            # x + (da) (x0 + x0')/2 + (ds) (eps + eps')/2, with x + da x0 + ds eps = guess.
            d_alpha, d_sigma = then.alpha - now.alpha, then.sigma - now.sigma
            if variable == "ratio":  # x/alpha + d(sigma/alpha) (eps + eps')/2, times the new alpha
                d_alpha, d_sigma = 0.0, then.sigma - then.alpha * now.sigma / now.alpha
            guess = guess + 0.5 * d_alpha * (ahead.x0 - seen.x0) + 0.5 * d_sigma * (ahead.eps - seen.eps)
        x = report(callback, i, now.t, guess, seen.x0)
    return x


def _raised(schedule: NoiseSchedule, now: Knot, gamma: float, low: float, high: float) -> Knot | None:
    """The knot at (1 + gamma) sigma/alpha of `now`, t_max's at most; None where no noise is to be added."""
    if gamma == 0 or now.alpha == 0 or not low <= now.sigma / now.alpha <= high:
        return None
    top = torch.tensor(schedule.t_max, dtype=torch.float64)
    lam = torch.maximum(torch.tensor(now.lam - math.log1p(gamma), dtype=torch.float64), 0.5 * schedule.log_snr(top))
    if float(lam) >= now.lam:
        return None
    return knots(schedule, schedule.time_from_log_snr(2 * lam).reshape(1))[0]
