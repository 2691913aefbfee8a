"""What the samplers share: the grid with its coefficients, the evaluation at a knot, and the callback."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample

# callback(step, t, x, x0): after step number `step` (from 0), which looked at time t and found x0 there, x [B, ...] is
# the new state.  A tensor that it returns takes the place of x.
Callback = Callable[[int, float, Tensor, Tensor], Tensor | None]


class Knot(NamedTuple):
    """One time of a grid: x_t = alpha x0 + sigma eps; lam = log(alpha / sigma), +inf at sigma = 0, -inf at alpha = 0."""

    t: float
    alpha: float
    sigma: float
    lam: float


def knots(schedule: NoiseSchedule, grid: Tensor) -> list[Knot]:
    """The grid [n + 1] with its coefficients, computed in float64."""
    columns = (grid, schedule.alpha(grid), schedule.sigma(grid), 0.5 * schedule.log_snr(grid))
    return [Knot(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def look(denoiser: DenoiserLike, x: Tensor, knot: Knot) -> Denoised:
    """The denoiser at a knot.  On clean data it is not asked: x is alpha x0, and E[eps | x] is 0 there.

    eps = -sigma score, and the score of a density is finite; a network's row y = A x0 + B eps may have no inverse.
    """
    if knot.sigma > 0:
        return denoiser(x, knot.t)
    return Denoised(x / knot.alpha, torch.zeros_like(x), denoiser.schedule, per_sample(knot.t, x))


def report(callback: Callback | None, step: int, t: float, x: Tensor, x0: Tensor) -> Tensor:
    """Calls the callback, if there is one, and returns the state to go on from."""
    replaced = callback(step, t, x, x0) if callback is not None else None
    return x if replaced is None else replaced
