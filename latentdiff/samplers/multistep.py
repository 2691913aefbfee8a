"""Solvers that remember the previous evaluation."""

import math
from itertools import pairwise

from torch import Tensor

from latentdiff.rng import Generators
from latentdiff.samplers.common import Callback, DenoiserLike, knots, report


def dpmpp_2m(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), 2211.01095 algorithm 2: order 2 with one evaluation a step.

    x_s = (sigma_s/sigma_t) x_t + alpha_s (1 - e^-h) D,  D = x0 + (x0 - x0_previous) h / (2 h_previous),
    h the step in log(alpha/sigma).  The first step, and one that ends on sigma = 0, are of order 1.  Draws nothing.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].
    """
    previous, h_previous = None, math.nan
    for i, (now, then) in enumerate(pairwise(knots(denoiser.schedule, grid))):
        seen, h = denoiser(x, now.t), then.lam - now.lam
        d = seen.x0
        if previous is not None and then.sigma > 0:
            d = d + (h / (2 * h_previous)) * (seen.x0 - previous)
        x = (then.sigma / now.sigma) * x - then.alpha * math.expm1(-h) * d
        previous, h_previous = seen.x0, h
        x = report(callback, i, now.t, x, seen.x0)
    return x
