"""What the samplers share: points of the time grid, the denoiser at such a point, and the callback."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample

# callback(step, t, x, x0) is called after each step: step counts from 0, t is the time at which the step evaluated the
# denoiser, x0 [B, ...] its estimate there, and x [B, ...] the new state. A tensor that it returns takes the place of x
Callback = Callable[[int, float, Tensor, Tensor], Tensor | None]


class GridPoint(NamedTuple):
    """One time t of a grid: x_t = alpha x0 + sigma eps, and lam = log(alpha / sigma), +inf at sigma = 0, -inf at alpha = 0."""

    t: float
    alpha: float
    sigma: float
    lam: float


def grid_points(schedule: NoiseSchedule, grid: Tensor) -> list[GridPoint]:
    """The points of a grid, in its order: alpha, sigma and lam at each of its times, computed in float64.

    schedule: the noise schedule. grid: times [n + 1], float64.
    """
    columns = (grid, schedule.alpha(grid), schedule.sigma(grid), 0.5 * schedule.log_snr(grid))
    return [GridPoint(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


def denoise_at(denoiser: DenoiserLike, x: Tensor, point: GridPoint) -> Denoised:
    """The denoiser's estimates at x [B, ...] and a grid point, as `Denoised`.

    At sigma = 0 the denoiser is not called: x0 = x / alpha and E[eps | x] = 0. For eps = -sigma score, and the score of a
    density is finite; a network's row y = A x0 + B eps may have no inverse there.
    """
    if point.sigma > 0:
        return denoiser(x, point.t)
    return Denoised(x / point.alpha, torch.zeros_like(x), denoiser.schedule, per_sample(point.t, x))


def apply_callback(callback: Callback | None, step: int, t: float, x: Tensor, x0: Tensor) -> Tensor:
    """Call the callback, if there is one, and return the state to continue from: what it returned, or x.

    step, t, x, x0: its arguments, see `Callback`.
    """
    replaced = callback(step, t, x, x0) if callback is not None else None
    return x if replaced is None else replaced
