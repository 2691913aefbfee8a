"""The probability-flow ODE with steps chosen by an error estimate: `solve` for any ODE, `dopri5` the sampler.

Each sample has steps of its own (torchode), so its result does not depend on the rest of the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.samplers.common import Callback, DenoiserLike, report
from latentdiff.samplers.ode import heun
from latentdiff.utils.random import Generators
from latentdiff.utils.tensors import widen


class Solution(NamedTuple):
    """y: the state at t1, [B, ...].  nfe: how often fn was needed for each sample, int64 [B]."""

    y: Tensor
    nfe: Tensor


@torch.no_grad()
def solve(
    fn: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    t0: float,
    t1: float,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
    norm: Callable[[Tensor], Tensor] | None = None,
    variable: str = "t",
) -> Solution:
    """The solution of dy/dt = fn(t, y) at t1, started from y at t0; t1 may be below t0.

    fn(t, y) -> dy/dt: t is float64 [B], y and dy/dt are [B, ...]; it is always called with the whole batch.
    y: [B, ...], float32 or float64; returned in its dtype.  No gradient flows through.
    rtol, atol: a step is taken when the root mean square over a sample's entries of error / (atol + rtol max|y|) is
    below 1.  Initial step, step sizes and acceptance are each sample's own (torchdiffeq shares them over the batch), so
    a sample's solution is that of a batch of one, up to the rounding of fn's own kernels at another batch size; a
    sample that has arrived waits with steps of length 0.
    max_steps: the most steps of one sample, rejected ones included; six evaluations each, and two to begin with.
    norm: what makes one number [B] of the ratios [B, D] that are to be below 1, the root mean square by default.
    variable: what messages call t.
    UserError if a sample needs more, or its state stops being finite, and for y of another dtype.
    """
    for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if not value > 0:
            raise UserError(f"{name}: must be above 0, not {value}")
    if y.dtype not in (torch.float32, torch.float64):
        raise UserError(f"y: the ODE is solved in float32 or float64, not {str(y.dtype).removeprefix('torch.')}")
    if t0 == t1 or y.shape[0] == 0:
        return Solution(y, torch.zeros(y.shape[0], dtype=torch.long, device=y.device))
    # Imported here: it brings sympy, start-up time that no other command should pay.
    from torchode import AutoDiffAdjoint, Dopri5, InitialValueProblem, IntegralController, ODETerm

    left = (
        f"the ODE from {variable} = {t0:g} to {t1:g} leaves the finite numbers at rtol {rtol:g}, atol {atol:g}; "
        "the function is not finite there, or the tolerance lets too long a step through"
    )

    def flat(t: Tensor, state: Tensor) -> Tensor:
        if not bool(torch.isfinite(t).all()):  # the length of a step comes from the values before it
            raise NotFiniteError(left)
        return fn(t, state.reshape(y.shape)).to(y.dtype).reshape(state.shape)

    ends = [torch.full((y.shape[0],), t, dtype=torch.float64, device=y.device) for t in (t0, t1)]
    # torchode calls a sample failed once it has taken max_steps, even if the last of them arrived.
    controller = IntegralController(atol=atol, rtol=rtol, norm=norm or _root_mean_square)
    solver = AutoDiffAdjoint(Dopri5(), controller, max_steps=max_steps + 1)
    problem = InitialValueProblem(y.reshape(y.shape[0], -1), *ends)
    found = solver.solve(problem, ODETerm(flat, with_stats=False))
    end, steps = found.ys[:, -1].reshape(y.shape), found.stats["n_steps"]
    if bool((steps > max_steps).any()):
        raise UserError(
            f"max_steps: {max_steps} steps from {variable} = {t0:g} to {t1:g} are too few at rtol {rtol:g}, atol {atol:g}; "
            "raise max_steps, or rtol and atol"
        )
    if bool((found.status != 0).any()) or not bool(torch.isfinite(end).all()):
        raise NotFiniteError(left)
    return Solution(end, 2 + 6 * steps)  # its own count is of calls, which a slower neighbour adds to


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
    rtol, atol: of the local error of a step; max_steps: the most of a sample, as in `samplers.adaptive.solve`.  UserError
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


def _root_mean_square(ratios: Tensor) -> Tensor:
    return ratios.square().mean(dim=1).sqrt()
