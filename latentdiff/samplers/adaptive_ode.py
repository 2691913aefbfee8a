"""Adaptive integration of one ODE per sample: Dormand-Prince 5(4), each sample with steps of its own (torchode)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UserError


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


def _root_mean_square(ratios: Tensor) -> Tensor:
    return ratios.square().mean(dim=1).sqrt()
