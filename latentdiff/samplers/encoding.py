"""From data to noise by the probability-flow ODE, and interpolation between noises."""

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

# Solvers that run in both directions, with the options that make sense from data to noise (churn would draw)
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
    """The unit-variance noise [B, ...] that the probability-flow ODE ties to data (Score SDE, arXiv 2011.13456, section 4.3).

    `sample(denoiser, noise, sampler, steps, grid=grid)` decodes it; `round_trip_error` measures how well. Nothing is drawn. The
    first step, from t = 0, takes E[eps | x0] = 0 there, because the score of a density is finite.

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        x0: data [B, ...]. The result has its dtype, float32 at least.
        sampler: "heun", "dopri5" (with the options rtol, atol, max_steps) or "euler" (DDIM inversion), on the reversed grid.
        steps: steps of the grid; dopri5 takes as many as it needs.
        grid, callback, grid_options: as in `sample`.
        options: of the sampler.

    Raises:
        UserError: an unknown sampler, grid or option.
        NotFiniteError: noise that is not finite.
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
    """Spherical interpolation from a to b [B, ...], for each sample on its own: [sin((1 - w) o) a + sin(w o) b] / sin(o).

    o is the angle between the two samples. Two draws of N(0, I) in many dimensions then give something of the same length all
    the way, which a straight line does not.

    The formula is Shoemake's "Animating rotation with quaternion curves" (1985). DDIM (arXiv 2010.02502, section 5.3)
    interpolates the noises of two images by it.

    a, b: [B, ...], of one dtype, which the result has too. weight: w, a float or [B]; 0 gives a and 1 gives b.

    Parallel samples (o < 1e-4) are interpolated on a straight line. At o = pi the path is not unique, and the result is
    meaningless.
    """
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).expand(a.shape[0])  # [B]
    lengths = (flat_mean(a**2) * flat_mean(b**2)).sqrt()
    angle = torch.acos((flat_mean(a * b) / lengths).clamp(-1, 1))  # [B]
    flat = ~(angle > 1e-4)  # also where a sample is 0 and has no angle
    safe = torch.where(flat, torch.ones_like(angle), angle)
    of_a = torch.where(flat, 1 - w, torch.sin((1 - w) * safe) / torch.sin(safe))
    of_b = torch.where(flat, w, torch.sin(w * safe) / torch.sin(safe))
    return widen(of_a, a) * a + widen(of_b, b) * b
