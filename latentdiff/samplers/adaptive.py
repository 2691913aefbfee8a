"""The probability-flow ODE with steps chosen by an error estimate, for each sample its own."""

import torch
from torch import Tensor

from latentdiff.samplers.adaptive_ode import solve
from latentdiff.samplers.common import Callback, DenoiserLike, report
from latentdiff.samplers.ode import heun
from latentdiff.utils.random import Generators
from latentdiff.utils.tensors import widen


def dopri5(
    denoiser: DenoiserLike,
    x: Tensor,
    grid: Tensor,
    generator: Generators = None,
    callback: Callback | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
) -> Tensor:
    """Dormand-Prince 5(4) on the probability-flow ODE (2011.13456 eq. 13, there RK45), per-sample steps; draws nothing.

    Of the grid only the two ends count.  callback is called once, as step 0 with grid[0], the state at grid[-1] and the
    x0 found there.
    The variable is the angle atan(sigma/alpha): along it the path is smooth on every schedule, whereas in t it is not
    at the knots of a DDPM schedule, nor at t = 0 on VP, where sigma' is infinite.  For the same reason an end at
    sigma = 0 is reached from t_min: down by the x0 estimate there, up by a step of `heun`.
    rtol, atol: of the local error of a step; max_steps: the most of a sample, as in `samplers.adaptive_ode.solve`.  UserError
    where it does not arrive.
    x: the state [B, ...] at grid[0]; returns the state at grid[-1].
    """
    schedule = denoiser.schedule

    def slope(angle: Tensor, y: Tensor) -> Tensor:
        t = schedule.time_from_log_snr(-2 * angle.double().tan().log())
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        turning = (schedule.d_sigma(t) * alpha - sigma * schedule.d_alpha(t)) / (alpha**2 + sigma**2)  # d angle / dt
        return denoiser(y, t).velocity / widen(turning, y)

    times = grid[[0, -1]].clone()
    clean = schedule.sigma(times) == 0
    times[clean] = schedule.t_min
    if clean[0]:
        x = heun(denoiser, x, torch.stack([grid[0], times[0]]))
    start, end = torch.atan2(schedule.sigma(times), schedule.alpha(times)).tolist()
    if start != end:
        x = solve(slope, x, start, end, rtol, atol, max_steps, variable="angle").y
    if not clean[1] and callback is None:
        return x
    x0 = denoiser(x, float(times[1])).x0
    return report(callback, 0, float(grid[0]), float(schedule.alpha(grid[-1])) * x0 if clean[1] else x, x0)
