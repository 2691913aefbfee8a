"""Exponential integrators in lam = log(alpha/sigma) that use earlier evaluations: one evaluation of the denoiser a step.

With x0(lam) the denoiser's estimate along the path, the solution of the ODE is (DPM-Solver++, arXiv 2211.01095, eq. 8)
    x_s = (sigma_s/sigma_t) x_t + sigma_s int_t^s e^lam x0(lam) dlam.
A method puts something in the place of x0(lam): a constant (DDIM), or a polynomial through earlier values.
"""

import math
from itertools import pairwise

from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.samplers.common import Callback, DenoiserLike, apply_callback, grid_points
from latentdiff.utils.random import Generators, randn_like


def dpmpp_2m(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): order 2 with one evaluation of the denoiser a step.

    x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) D, with D = x0 + (x0 - x0_previous) h / (2 h_previous) and h the step in
    log(alpha/sigma). The first step, and one that ends on sigma = 0, are of order 1.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: not used: this sampler draws nothing.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.

    Returns:
        The state [B, ...] at grid[-1].
    """
    previous, h_previous = None, math.nan
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out, h = denoiser(x, now.t), then.lam - now.lam
        d = out.x0
        if previous is not None and then.sigma > 0:
            d = d + (h / (2 * h_previous)) * (out.x0 - previous)
        x = (then.sigma / now.sigma) * x - then.alpha * math.expm1(-h) * d
        previous, h_previous = out.x0, h
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x


def dpmpp_2m_sde(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, eq. 19), with eta as in k-diffusion: the reverse SDE with g sqrt(eta).

    x_s = (sigma_s/sigma_t) e^-(eta h) x_t + alpha_s (1 - e^-(1 + eta)h) D + sigma_s sqrt(1 - e^-2(eta h)) z, with h and D as in
    `dpmpp_2m`, which is eta = 0. One evaluation of the denoiser a step.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: draws the noise: one, a list of B (one per sample), or None.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.
        eta: scale of the noise, at least 0; 0 draws nothing.

    Returns:
        The state [B, ...] at grid[-1].

    Raises:
        UserError: a negative eta.
    """
    if not eta >= 0:
        raise UserError(f"eta: at least 0, not {eta}")
    previous, h_previous = None, math.nan
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out, h = denoiser(x, now.t), then.lam - now.lam
        d = out.x0
        if then.sigma > 0:
            if previous is not None:
                d = d + (h / (2 * h_previous)) * (out.x0 - previous)
            eta_h = eta * h if eta > 0 else 0.0  # h is infinite in a step from alpha = 0
            kept, drawn = math.exp(-eta_h), math.sqrt(-math.expm1(-2 * eta_h))
            x = (then.sigma / now.sigma) * kept * x - then.alpha * math.expm1(-h - eta_h) * d
            x = x + then.sigma * drawn * randn_like(x, generator) if drawn > 0 else x
        else:
            x = then.alpha * d
        previous, h_previous = out.x0, h
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x


def dpmpp_3m(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """The third-order multistep method with data prediction: x0(lam) is the parabola through the last three values.

    x_s = (sigma_s/sigma_t) x_t + alpha_s [p1 D + p2 D' + p3 D''], with p1 = 1 - e^-h, p2 = h - p1, p3 = h^2/2 - p2, and D, D',
    D'' the parabola's value and derivatives at lam_t. It is exact in h for uneven steps; diffusers' third-order DPM-Solver++
    (arXiv 2211.01095) assumes even ones. A method of order 3 must not begin with a step of order 1, so the second evaluation
    corrects the first step, by a line through both values (UniC-2 of UniPC, arXiv 2302.04867, section 3.2). A step that ends on
    sigma = 0 is of order 1. One evaluation of the denoiser a step.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: descending times [n + 1] in [0, 1], float64; 0 is data.
        generator: not used: this sampler draws nothing.
        callback: called after each step; see `latentdiff.samplers.common.Callback`.

    Returns:
        The state [B, ...] at grid[-1].
    """
    past: list[tuple[float, Tensor]] = []  # (lam, x0), the latest first
    for i, (now, then) in enumerate(pairwise(grid_points(denoiser.schedule, grid))):
        out, h = denoiser(x, now.t), then.lam - now.lam
        if i == 1 and math.isfinite(past[0][0]):
            h_first = now.lam - past[0][0]
            x = x + now.alpha * _weights(h_first)[1] / h_first * (out.x0 - past[0][1])
        past = [(now.lam, out.x0), *past[:2]]
        if then.sigma > 0:
            move = sum(p * d for p, d in zip(_weights(h), _derivatives(past), strict=False))
            x = (then.sigma / now.sigma) * x + then.alpha * move
        else:
            x = then.alpha * out.x0
        x = apply_callback(callback, i, now.t, x, out.x0)
    return x


def _weights(h: float) -> tuple[float, float, float]:
    """int_0^h e^-(h - u) u^k / k! du for k = 0, 1, 2."""
    p1 = -math.expm1(-h)
    return p1, h - p1, 0.5 * h**2 - (h - p1)


def _derivatives(past: list[tuple[float, Tensor]]) -> list[Tensor]:
    """Value and derivatives at past[0] of the polynomial through the points (lam, x0), by divided differences."""
    (lam, d), *rest = past
    if not rest:
        return [d]
    first = (d - rest[0][1]) / (lam - rest[0][0])
    if len(rest) == 1:
        return [d, first]
    second = (first - (rest[0][1] - rest[1][1]) / (rest[0][0] - rest[1][0])) / (lam - rest[1][0])
    return [d, first + second * (lam - rest[0][0]), 2 * second]
