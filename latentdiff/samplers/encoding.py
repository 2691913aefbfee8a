"""Data to noise and back by the probability-flow ODE, and what to do with the noise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.samplers.adaptive import dopri5
from latentdiff.samplers.common import Callback, DenoiserLike
from latentdiff.samplers.grids import make_grid
from latentdiff.samplers.ode import euler, heun
from latentdiff.utils.tensors import flat_mean, widen

# Solvers that run in both directions, with the options that make sense upwards (churn would draw).
ENCODERS: Mapping[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "heun": (heun, ()),
    "dopri5": (dopri5, ("rtol", "atol", "max_steps")),
    "euler": (euler, ()),
}


@torch.no_grad()
def encode(
    denoiser: DenoiserLike,
    x0: Tensor,
    sampler: str = "heun",
    steps: int = 50,
    grid: str | Tensor | Sequence[float] = "angle",
    callback: Callback | None = None,
    grid_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Data [B, ...] to the unit-variance noise [B, ...] that the probability-flow ODE ties to it (2011.13456 section 4.3).

    `sample(denoiser, noise, sampler, steps, grid=grid)` decodes it; `samplers.round_trip_error` says how well.
    x0: worked on, and returned, in float32 at least.
    sampler: heun, dopri5 (options rtol, atol, max_steps) or euler (DDIM inversion), on the reversed grid.  Draws nothing.
    The first step, from t = 0, takes E[eps | x0] = 0 there: a density's score is finite.
    callback, grid_options: as in `sample`.  UserError for an unknown sampler, grid or option, and for noise that is not finite.
    """
    if sampler not in ENCODERS:
        raise UserError(f"sampler: {sampler!r} does not encode; valid: {', '.join(ENCODERS)}")
    run, valid = ENCODERS[sampler]
    for option in options:
        if option not in valid:
            raise UserError(f"sampler: encoding with {sampler} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
    times = make_grid(grid, denoiser.schedule, steps, grid_options).flip(0)
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    noise = run(denoiser, x0, times, None, callback, **options) / float(denoiser.schedule.start_std(times[-1]))
    if not bool(torch.isfinite(noise).all()):
        raise NotFiniteError(f"encoding with {sampler}: the noise is not finite; the network or its weights have diverged")
    return noise


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation from a (weight 0) to b (weight 1), sample by sample.

    [sin((1 - w) o) a + sin(w o) b] / sin(o), o the angle between the two samples: two draws of N(0, I) in many
    dimensions give something of the same length all the way, which a straight line does not.
    a, b: [B, ...]; weight: a float or [B].  Samples that are parallel (o < 1e-4) are interpolated straight; at o = pi
    there is no way to prefer, and the result is not to be used.
    """
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).expand(a.shape[0])  # [B]
    lengths = (flat_mean(a**2) * flat_mean(b**2)).sqrt()
    angle = torch.acos((flat_mean(a * b) / lengths).clamp(-1, 1))  # [B]
    flat = ~(angle > 1e-4)  # also where a sample is 0 and has no angle
    safe = torch.where(flat, torch.ones_like(angle), angle)
    of_a = torch.where(flat, 1 - w, torch.sin((1 - w) * safe) / torch.sin(safe))
    of_b = torch.where(flat, w, torch.sin(w * safe) / torch.sin(safe))
    return widen(of_a, a) * a + widen(of_b, b) * b
