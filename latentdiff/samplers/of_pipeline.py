"""A diffusion pipeline's reverse process by one of the samplers here.

This module keeps its name for good, and `by_sampler` its arguments: every published checkpoint carries a pipeline.py
(pipelines/latent_diffusion.py) that looks them up by name.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from latentdiff import samplers
from latentdiff.denoiser import Denoiser
from latentdiff.guidance import ClassifierFree
from latentdiff.utils.random import Generators


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
    """
    return partial(_run, pipe, name, use_default_steps and name != pipe.config.default_sampler, options, guide)


def _run(
    pipe: Any,
    name: str,
    use_default_steps: bool,
    options: dict[str, Any],
    guide: Callable[[Any], Any] | None,
    noise: Tensor,
    conditions: tuple[dict[str, Tensor], dict[str, Tensor]],
    scale: float,
    interval: tuple[float, float] | None,
    steps: int,
    generator: Generators,
    callback: Callable[..., dict[str, Any] | None] | None,
) -> Tensor:
    """Normalised latents [B, c, h, w] from unit-variance noise of that shape.

    conditions: the U-Net's keyword arguments to guide to, and those to guide away from.
    """
    steps = samplers.default_steps(name, steps) if use_default_steps else steps
    denoiser: Any = ClassifierFree(Denoiser.from_pipeline(pipe), *conditions, scale, interval=interval)
    denoiser = denoiser if guide is None else guide(denoiser)
    pipe._num_timesteps = steps
    with pipe.progress_bar(total=steps) as bar:

        def after_step(step: int, t: float, x: Tensor, x0: Tensor) -> Tensor | None:
            bar.update()
            changed = (callback(pipe, step, t, {"latents": x}) or {}).get("latents") if callback else None
            if getattr(pipe, "interrupt", False):  # the pipeline.py of an older checkpoint has no such property
                raise _Interrupted(x if changed is None else changed)
            return changed

        try:
            return samplers.sample(
                denoiser, noise, sampler=name, steps=steps, generator=generator, callback=after_step, **options
            )
        except _Interrupted as stop:
            return stop.x
