"""A diffusion pipeline's reverse process by one of the samplers here.

This module keeps its name for good, and `by_sampler` its arguments: every published checkpoint carries a pipeline.py
(pipelines/latent_diffusion.py) that looks them up by name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentdiff import prediction as predictions
from latentdiff import samplers
from latentdiff.denoiser import Denoised, Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.guidance import Autoguidance, ClassifierFree, Rule
from latentdiff.guidance.common import check_options, replace_estimates
from latentdiff.guidance.rules import OPTIONS_IN_WORDS, RunningSum
from latentdiff.samplers.grids import make_grid
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.random import Generators
from latentdiff.utils.tensors import per_sample, widen


class _Interrupted(Exception):
    """Ends a sampler's loop after a callback has set pipe._interrupt. x: the latents [B, c, h, w] so far."""

    def __init__(self, x: Tensor):
        super().__init__("interrupted")
        self.x = x


def by_sampler(
    pipe: Any,
    name: str,
    use_default_steps: bool,
    options: dict[str, Any],
    guide: Callable[[Any], Any] | None,
    rule: dict[str, Any] | None = None,
    weak: Any = None,
    start: Any = None,
    image_scale: float = 1.0,
) -> Callable[..., Tensor]:
    """A function that a `LatentDiffusionPipeline` calls in the place of its own denoising loop.

    It is called as run(noise, conditions, scale, interval, steps, generator, callback), as `_run` is without its first
    arguments, and returns normalised latents [B, c, h, w].

    Args:
        pipe: the pipeline, with a U-Net.
        name: one of `latentdiff.samplers.names()`.
        use_default_steps: the call gave no number of steps. Then a sampler that needs more than the checkpoint's default takes
            more, unless it is the checkpoint's own sampler.
        options: keyword arguments of the sampler.
        guide: a function denoiser -> denoiser put around the classifier-free-guided one, or None.
        rule: how estimates are guided: the fields of `latentdiff.guidance.Rule`, and rescale, see `ClassifierFree`.
        weak: a U-Net to guide away from in the place of the unconditional prediction; see `Autoguidance`.
        start: an `ImageStart` of the pipeline, for a call that changes an image, or None.
        image_scale: scale of guidance by a second image, where the call's `conditions` have a third entry, without it.

    Raises:
        UserError: an unknown rule, or an option out of range.
    """
    steps = use_default_steps and name != pipe.config.default_sampler
    run = partial(_run, pipe, name, steps, options, guide, *_parse(rule), weak)
    return partial(run, start=start, image_scale=image_scale)


def output_rule(pipe: Any, rule: dict[str, Any]) -> Callable[..., Tensor]:
    """A rule of guidance on outputs of a network, for the loop of a `LatentDiffusionPipeline` with a diffusers scheduler.

    It is called as combine(model_input, timestep, positive, negative, scale), with what the network was given, [B, c, h, w] and
    a number, and its outputs to guide to and away from. It returns the guided output [B, c, h, w].

    pipe, rule: as in `by_sampler`. UserError for an unknown rule, or an option out of range.
    """
    chosen, rescale = _parse(rule)
    denoiser = Denoiser.from_pipeline(pipe)
    schedule, prediction = denoiser.schedule, denoiser.prediction
    running = RunningSum(chosen.momentum)

    def combine(model_input: Tensor, timestep: Tensor, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        times = per_sample(schedule.time_from_timestep(timestep), model_input)
        x = model_input.float() / widen(schedule.input_scale(times), model_input.float())
        p, n = (Denoised(*predictions.solve(prediction, schedule, x, times, y), schedule, times) for y in (positive, negative))
        rows = torch.ones(len(x), dtype=torch.bool, device=x.device)
        summed = partial(running.add, rows=rows.nonzero()[:, 0], count=len(x))
        guided = replace_estimates(x, p, *chosen.combine(x, p, n, scale, summed), rows, rescale)
        return predictions.target(prediction, schedule, guided.x0, guided.eps, times)

    return combine


def _parse(rule: dict[str, Any] | None) -> tuple[Rule, float]:
    """(the rule, rescale) of `by_sampler`'s argument. UserError for an option that there is not."""
    options = dict(rule or {})
    rescale = options.pop("rescale", 0.0)
    check_options(None, rescale)
    try:
        return Rule(**options), rescale
    except TypeError:
        given = sorted(options.keys() - {"name"})
        raise UserError(f"guidance_options {given}: valid: {OPTIONS_IN_WORDS}, as numbers") from None


def _run(
    pipe: Any,
    name: str,
    use_default_steps: bool,
    options: dict[str, Any],
    guide: Callable[[Any], Any] | None,
    rule: Rule,
    rescale: float,
    weak: Any,
    noise: Tensor,
    conditions: tuple[dict[str, Tensor], dict[str, Tensor]],
    scale: float,
    interval: tuple[float, float] | None,
    steps: int,
    generator: Generators,
    callback: Callable[..., dict[str, Any] | None] | None,
    start: Any = None,
    image_scale: float = 1.0,
) -> Tensor:
    """Normalised latents [B, c, h, w] from unit-variance noise of that shape.

    conditions: the U-Net's keyword arguments to guide to, and those to guide away from; a third entry has no second
    image. start, image_scale: see `by_sampler`.
    """
    steps = samplers.default_steps(name, steps) if use_default_steps else steps
    plain = Denoiser.from_pipeline(pipe)
    options_of_rule: dict[str, Any] = {"interval": interval, "rescale": rescale, "rule": rule}
    denoiser: Any
    if weak is None:
        bare = conditions[2] if len(conditions) > 2 else None
        denoiser = ClassifierFree(plain, *conditions[:2], scale, **options_of_rule, bare=bare, bare_scale=image_scale)
    else:
        model = partial(unet_model(weak, plain.schedule), **conditions[0])
        strong = ClassifierFree(plain, *conditions[:2], 1.0)
        denoiser = Autoguidance(strong, Denoiser(model, plain.schedule, plain.prediction), scale, **options_of_rule)
    denoiser = denoiser if guide is None else guide(denoiser)
    fixed = noise
    if start is not None:
        for name_of_option in {"start", "replacement"} & options.keys():
            raise UserError(f"sampler_options: {name_of_option} is taken by image=; leave it out")
        noise, options, steps = _from_image(denoiser.schedule, noise, dict(options), steps, start)
        if steps == 0:
            return start.keep(noise, fixed, 1.0, 0.0)
    pipe._num_timesteps = steps
    with pipe.progress_bar(total=steps) as bar:

        def after_step(step: int, t: float, x: Tensor, x0: Tensor) -> Tensor | None:
            bar.update()
            changed = (callback(pipe, step, t, {"latents": x}) or {}).get("latents") if callback else None
            if getattr(pipe, "interrupt", False):  # the pipeline.py of an older checkpoint has no such property
                raise _Interrupted(x if changed is None else changed)
            return changed

        try:
            latents = samplers.sample(
                denoiser, noise, sampler=name, steps=steps, generator=generator, callback=after_step, **options
            )
        except _Interrupted as stop:
            latents = stop.x
    return latents if start is None else start.keep(latents, fixed, 1.0, 0.0)


def _from_image(
    schedule: NoiseSchedule, noise: Tensor, options: dict[str, Any], steps: int, start: Any
) -> tuple[Tensor, dict[str, Any], int]:
    """(x_t, options, steps) that go on from an image: the last part of the grid, from its noisy latents.

    options, steps: of a call without an image. noise: unit-variance noise [B, c, h, w]. start: see `by_sampler`.
    """
    times = make_grid(options.pop("grid", "angle"), schedule, steps, options.pop("grid_options", None))
    skipped = start.skipped_steps(len(times) - 1)
    first = times[skipped]
    if skipped == len(times) - 1:  # strength 0; of a schedule whose grid ends above 0 (VE) the image itself too
        return start.noised(noise, 1.0, 0.0, 1.0), options, 0
    x = start.noised(noise, float(schedule.alpha(first)), float(schedule.sigma(first)), float(schedule.start_std(first)))
    if start.known is not None:
        options["replacement"] = samplers.Replacement(start.known, start.is_free, noise=noise)
    return x, {**options, "grid": times[skipped:], "start": "state"}, len(times) - 1 - skipped
