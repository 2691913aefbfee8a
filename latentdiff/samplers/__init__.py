"""Samplers: functions of (denoiser, x, grid, generator, callback) without state, that `sample` finds by name."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import NotFiniteError, UserError
from latentdiff.samplers.adaptive import dopri5
from latentdiff.samplers.ancestral import ancestral, ddim
from latentdiff.samplers.common import Callback, DenoiserLike
from latentdiff.samplers.encoding import encode, slerp
from latentdiff.samplers.grids import make_grid
from latentdiff.samplers.langevin import annealed_langevin, predictor_corrector
from latentdiff.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from latentdiff.samplers.ode import euler, heun
from latentdiff.samplers.replacement import Replacement, run_replaced
from latentdiff.samplers.sde import euler_maruyama, reverse_diffusion
from latentdiff.utils.random import Generators, randn
from latentdiff.utils.tensors import flat_mean

__all__ = [
    "Callback",
    "Replacement",
    "ancestral",
    "annealed_langevin",
    "ddim",
    "default_steps",
    "dopri5",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "encode",
    "euler",
    "euler_maruyama",
    "heun",
    "names",
    "predictor_corrector",
    "reverse_diffusion",
    "round_trip_error",
    "sample",
    "slerp",
]


_SAMPLERS: Mapping[str, Callable[..., Tensor]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler_maruyama": euler_maruyama,
    "reverse_diffusion": reverse_diffusion,
    "predictor_corrector": predictor_corrector,
    "annealed_langevin": annealed_langevin,
    "euler": euler,
    "heun": heun,
    "dopri5": dopri5,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
# With the steps that a multistep ODE solver needs, first-order discretisations of the SDE leave noise in the image
_FEWEST_STEPS: Mapping[str, int] = {"euler_maruyama": 50, "reverse_diffusion": 100, "predictor_corrector": 50}
_COMMON = ("denoiser", "x", "grid", "generator", "callback")


def names() -> list[str]:
    """The names of the samplers."""
    return list(_SAMPLERS)


def default_steps(sampler: str, checkpoint_steps: int) -> int:
    """The number of steps of a call that gives none.

    sampler: one of `names()`. checkpoint_steps: the checkpoint's default; some samplers of the SDE take more.
    """
    return max(checkpoint_steps, _FEWEST_STEPS.get(sampler, 1))


@torch.no_grad()
def sample(
    denoiser: DenoiserLike,
    noise_or_shape: Tensor | Sequence[int],
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    generator: Generators = None,
    callback: Callback | None = None,
    grid: str | Tensor | Sequence[float] = "angle",
    grid_options: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    start: str = "noise",
    replacement: Replacement | None = None,
    **options: Any,
) -> Tensor:
    """Draw samples: from noise, by a sampler, to the x0 estimate at the last time of the grid, [B, ...].

    Args:
        denoiser: a `Denoiser`, or guidance around one.
        noise_or_shape: unit-variance noise [B, ...], or a shape to draw it in (float32, on the generator's device, then moved
            to `device`). It is scaled by the standard deviation of x at the grid's first time (`schedule.start_std`, which is
            prior_std at t_max). A dtype below float32 becomes float32.
        sampler: one of `names()`.
        steps: steps of the grid. A step is one evaluation of the denoiser; two for heun, and for predictor_corrector by
            default; inner_steps for annealed_langevin. dopri5 takes as many steps as it needs.
        generator: one, or a list of B; sample i is then the same at any batch size. None for torch's default.
        callback: callback(step, t, x, x0), called after each step (dopri5: once, at the end). It may return a tensor to
            continue from in the place of x.
        grid: a name of `latentdiff.samplers.grids`, or descending times [n + 1]; then `steps` is not used.
        grid_options: options of the named grid, such as {"rho": 5.0} for karras.
        device: of noise that is drawn here.
        start: "noise", or "state" where the tensor is x_t itself at the grid's first time, such as data with noise added; it is
            then not scaled.
        replacement: entries of x0 that are known, for inpainting.
        options: options of the sampler, such as eta for ddim.

    Raises:
        UserError: an unknown sampler, grid or option.
        NotFiniteError: samples that are not finite; it names the evaluation at fault.
    """
    if sampler not in _SAMPLERS:
        raise UserError(f"sampler: {sampler!r} is unknown; valid: {', '.join(_SAMPLERS)}")
    run = _SAMPLERS[sampler]
    _check_options(sampler, run, options)
    if start not in ("noise", "state") or (start == "state" and not isinstance(noise_or_shape, Tensor)):
        raise UserError(f'start: {start!r}; valid: "noise", or "state" with a tensor x_t at the grid\'s first time')
    schedule = denoiser.schedule
    times = make_grid(grid, schedule, steps, grid_options)
    noise = noise_or_shape if isinstance(noise_or_shape, Tensor) else randn(noise_or_shape, generator, device)
    noise = noise.to(torch.promote_types(noise.dtype, torch.float32))
    scale = float(schedule.start_std(times[0])) if start == "noise" else 1.0
    end = float(times[-1])

    def draw(denoiser: Any, callback: Callback | None) -> Tensor:
        arguments = (denoiser, noise * scale, times, generator, callback)
        if replacement is None:
            x = run(*arguments, **options)
        else:
            x = run_replaced(run, *arguments, replacement, whole=sampler != "dopri5", **options)
        x = x if float(schedule.sigma(end)) == 0 else denoiser(x, end).x0
        return x if replacement is None else replacement.put(x, None, generator)

    x = draw(denoiser, callback)
    if not bool(torch.isfinite(x).all()):
        reason = _first_non_finite(denoiser, lambda checked: draw(checked, None))
        if float(schedule.alpha(times[0])) == 0:
            reason = f"the grid starts at t = {float(times[0]):g}, where alpha is 0; start at t_max = {schedule.t_max:g}"
        raise NotFiniteError(f"sampler {sampler}: the samples are not finite; {reason}")
    return x


def _first_non_finite(denoiser: DenoiserLike, run: Callable[[Any], object]) -> str:
    """Where the denoiser first gives a result that is not finite, found by a second run with every result checked.

    run: run(denoiser) samples again.
    """
    evaluations = 0

    class Checked:
        schedule = denoiser.schedule

        def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Any:
            nonlocal evaluations
            evaluations += 1
            out = denoiser(x, t, **conditioning)
            if not bool(torch.isfinite(out.x0).all()):
                largest = float(x.abs().max())
                where = f"evaluation {evaluations}, t = {float(torch.as_tensor(t).max()):.4g}"
                raise NotFiniteError(f"the network's output is not finite ({where}, input up to {largest:.3g})")
            return out

    try:
        run(Checked())
    except NotFiniteError as error:
        return str(error)
    return "the network's outputs are finite, so the steps are too long or the guidance too strong"


def _check_options(sampler: str, run: Callable[..., Tensor], options: Mapping[str, Any]) -> None:
    """UserError for an option that the sampler does not have, or of another type than its default."""
    defaults = {name: p.default for name, p in signature(run).parameters.items() if name not in _COMMON}
    for option, value in options.items():
        if option not in defaults:
            raise UserError(f"sampler: {sampler} has no option {option!r}; valid: {', '.join(defaults) or 'none'}")
        default = defaults[option]
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
            kind = {float: "number", int: "whole number", str: "name"}.get(type(default), type(default).__name__)
            raise UserError(f"sampler: {sampler}'s {option} must be a {kind} such as {default!r}, not {value!r}")


def round_trip_error(
    denoiser: DenoiserLike,
    x0: Tensor,
    sampler: str = "heun",
    steps: int = 50,
    grid: str | Tensor | Sequence[float] = "angle",
    grid_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Root mean square of decode(encode(x0)) - x0 over the entries of each sample, [B]. Arguments as in `encode`.

    It has three parts: the solver's error in both directions; the last step of decoding, which is the x0 estimate and not the
    ODE (about sigma^2 |score| / 2 at the grid's last positive sigma; karras and log_snr end lower than angle); and the part of
    x0 that is outside of the model's distribution.
    """
    noise = encode(denoiser, x0, sampler, steps, grid, grid_options=grid_options, **options)
    back = sample(denoiser, noise, sampler, steps, grid=grid, grid_options=grid_options, **options)
    return flat_mean((back - x0) ** 2).sqrt()
