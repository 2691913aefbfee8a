"""ODE solving with steps chosen by an error estimate: `solve` for any ODE, and the sampler `dopri5`.

Each sample has steps of its own (torchode), so its result does not depend on the rest of the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.samplers.common import Callback, DenoiserLike, apply_callback
from latentdiff.samplers.ode import heun
from latentdiff.utils.random import Generators
from latentdiff.utils.tensors import widen


class Solution(NamedTuple):
    """The result of `solve`.

    y: the state at t1, [B, ...]. nfe: evaluations of fn that each sample needed, int64 [B].
    """

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
    """The solution of dy/dt = fn(t, y) at t1, from y at t0, by Dormand-Prince 5(4). No gradient flows through.

    The initial step, the step sizes and their acceptance are each sample's own (torchdiffeq shares them over the batch). So the
    solution of a sample is that of a batch of one, up to the rounding of fn's kernels at another batch size. A sample that has
    arrived waits with steps of length 0.

    Args:
        fn: fn(t, y) -> dy/dt, with t float64 [B], y and dy/dt [B, ...]; always called with the whole batch.
        y: the state at t0, [B, ...], float32 or float64; the result has its dtype.
        t0, t1: the ends; t1 may be below t0.
        rtol, atol: a step is accepted where the root mean square over a sample's entries of error / (atol + rtol max|y|) is
            below 1.
        max_steps: the most steps of one sample, rejected ones included. A step has six evaluations; two more come before the
            first.
        norm: what makes one number [B] of the ratios [B, D] that must be below 1; the root mean square by default.
        variable: the name of t in messages.

    Raises:
        UserError: a sample needs more steps, a tolerance is not above 0, or y has another dtype.
        NotFiniteError: a state that is not finite.
    """
    for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if not value > 0:
            raise UserError(f"{name}: must be above 0, not {value}")
    if y.dtype not in (torch.float32, torch.float64):
        raise UserError(f"y: the ODE is solved in float32 or float64, not {str(y.dtype).removeprefix('torch.')}")
    if t0 == t1 or y.shape[0] == 0:
        return Solution(y, torch.zeros(y.shape[0], dtype=torch.long, device=y.device))
    # Imported here: it imports sympy, which takes time that no other command should pay
    from torchode import AutoDiffAdjoint, Dopri5, InitialValueProblem, IntegralController, ODETerm

    not_finite = (
        f"the ODE from {variable} = {t0:g} to {t1:g} leaves the finite numbers at rtol {rtol:g}, atol {atol:g}; "
        "the function is not finite there, or the tolerance lets too long a step through"
    )

    def flat(t: Tensor, state: Tensor) -> Tensor:
        if not bool(torch.isfinite(t).all()):  # the length of a step depends on the values before it
            raise NotFiniteError(not_finite)
        return fn(t, state.reshape(y.shape)).to(y.dtype).reshape(state.shape)

    ends = [torch.full((y.shape[0],), t, dtype=torch.float64, device=y.device) for t in (t0, t1)]
    # torchode calls a sample failed once it has taken max_steps, even if the last of them arrived.
    controller = IntegralController(atol=atol, rtol=rtol, norm=norm or _root_mean_square)
    solver = AutoDiffAdjoint(Dopri5(), controller, max_steps=max_steps + 1)
    problem = InitialValueProblem(y.reshape(y.shape[0], -1), *ends)
    result = solver.solve(problem, ODETerm(flat, with_stats=False))
    end, steps = result.ys[:, -1].reshape(y.shape), result.stats["n_steps"]
    if bool((steps > max_steps).any()):
        raise UserError(
            f"max_steps: {max_steps} steps from {variable} = {t0:g} to {t1:g} are too few at rtol {rtol:g}, atol {atol:g}; "
            "raise max_steps, or rtol and atol"
        )
    if bool((result.status != 0).any()) or not bool(torch.isfinite(end).all()):
        raise NotFiniteError(not_finite)
    return Solution(end, 2 + 6 * steps)  # torchode counts calls, which include those for slower samples


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
    """Dormand-Prince 5(4) on the probability-flow ODE (Score SDE, arXiv 2011.13456, eq. 13, there RK45), with per-sample steps.

    The variable is the angle atan(sigma/alpha). Along it the path is smooth on every schedule; in t it is not smooth at the
    timesteps of a DDPM schedule, nor at t = 0 on VP, where sigma' is infinite. For the same reason an end at sigma = 0 is
    reached from t_min: down by the x0 estimate there, up by a step of `heun`.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x: the state x_t [B, ...] at grid[0].
        grid: times [n + 1], of which only the first and the last count, in [0, 1], float64; 0 is data.
        generator: not used: this sampler draws nothing.
        callback: called once, as step 0 with grid[0], the state at grid[-1] and the last x0 estimate; see
            `latentdiff.samplers.common.Callback`.
        rtol, atol: relative and absolute tolerance of the local error of a step.
        max_steps: the most steps of one sample.

    Returns:
        The state [B, ...] at grid[-1].

    Raises:
        UserError: a sample does not arrive in max_steps.
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
    return apply_callback(callback, 0, float(grid[0]), float(schedule.alpha(grid[-1])) * x0 if clean[1] else x, x0)


def _root_mean_square(ratios: Tensor) -> Tensor:
    return ratios.square().mean(dim=1).sqrt()
