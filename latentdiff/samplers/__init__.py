"""Samplers: functions of (denoiser, x, grid, generator, callback) without memory, found by name."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.grids import make_grid
from latentdiff.rng import Generators, randn
from latentdiff.samplers.ancestral import ancestral, ddim
from latentdiff.samplers.common import Callback, DenoiserLike
from latentdiff.samplers.multistep import dpmpp_2m
from latentdiff.samplers.ode import euler, heun

__all__ = ["Callback", "ancestral", "ddim", "dpmpp_2m", "euler", "heun", "names", "sample"]


_SAMPLERS: Mapping[str, Callable[..., Tensor]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}
_COMMON = ("denoiser", "x", "grid", "generator", "callback")


def names() -> list[str]:
    """The samplers there are."""
    return list(_SAMPLERS)


@torch.no_grad()
def sample(
    denoiser: DenoiserLike,
    noise_or_shape: Tensor | Sequence[int],
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    generator: Generators = None,
    callback: Callback | None = None,
    grid: str | Tensor = "angle",
    **options: Any,
) -> Tensor:
    """Draws from the prior and runs a sampler down to data: [B, ...], the x0 estimate at the grid's last time.

    noise_or_shape: unit-variance noise [B, ...], scaled by the schedule's prior_std here, or a shape to draw it in
    (float32, on the generator's device).
    sampler: one of `names()`.  steps: how many; each is one evaluation of the denoiser, two for heun.
    generator: one, or B of them (image i is then the same at any batch size).
    callback(step, t, x, x0): called after each step; may return a tensor to go on from.
    grid: a name of latentdiff.grids, or descending times [n + 1] (steps is then not looked at).
    options: the sampler's own, such as eta for ddim.  UserError for an unknown sampler, grid or option.
    """
    if sampler not in _SAMPLERS:
        raise UserError(f"sampler: {sampler!r} is unknown; valid: {', '.join(_SAMPLERS)}")
    run = _SAMPLERS[sampler]
    valid = [name for name in signature(run).parameters if name not in _COMMON]
    for option in options:
        if option not in valid:
            raise UserError(f"sampler: {sampler} has no option {option!r}; valid: {', '.join(valid) or 'none'}")
    schedule = denoiser.schedule
    times = make_grid(grid, schedule, steps)
    noise = noise_or_shape if isinstance(noise_or_shape, Tensor) else randn(noise_or_shape, generator)
    x = run(denoiser, noise * schedule.prior_std, times, generator, callback, **options)
    end = float(times[-1])
    return x if float(schedule.sigma(end)) == 0 else denoiser(x, end).x0
