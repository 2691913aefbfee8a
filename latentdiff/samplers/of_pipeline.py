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


def by_sampler(pipe: Any, name: str, unsaid: bool, options: dict[str, Any], guide: Any) -> Callable[..., Tensor]:
    """run(noise, told, scale, interval, steps, generator, callback), which a `LatentDiffusionPipeline` calls as its own loop.

    unsaid: the call named no steps, so that a sampler that needs more than the checkpoint's takes them, unless it is the
    checkpoint's own.  options: the sampler's keywords.  guide: denoiser -> denoiser, or None.
    """
    return partial(_run, pipe, name, unsaid and name != pipe.config.default_sampler, options, guide)


def _run(
    pipe: Any,
    name: str,
    unsaid: bool,
    options: dict[str, Any],
    guide: Callable[[Any], Any] | None,
    noise: Tensor,
    told: tuple[dict[str, Tensor], dict[str, Tensor]],
    scale: float,
    interval: tuple[float, float] | None,
    steps: int,
    generator: Generators,
    callback: Callable[..., dict[str, Any] | None] | None,
) -> Tensor:
    """Normalised latents [B, c, h, w] of unit-variance noise; told: the U-Net's keywords for and against."""
    steps = samplers.default_steps(name, steps) if unsaid else steps
    denoiser: Any = ClassifierFree(Denoiser.from_pipeline(pipe), *told, scale, interval=interval)
    denoiser = denoiser if guide is None else guide(denoiser)
    pipe._num_timesteps = steps
    with pipe.progress_bar(total=steps) as bar:

        def report(step: int, t: float, x: Tensor, x0: Tensor) -> Tensor | None:
            bar.update()
            changed = (callback(pipe, step, t, {"latents": x}) or {}).get("latents") if callback else None
            if getattr(pipe, "interrupt", False):  # the pipeline.py of an older checkpoint has none
                raise _Interrupted(x if changed is None else changed)
            return changed

        try:
            return samplers.sample(denoiser, noise, sampler=name, steps=steps, generator=generator, callback=report, **options)
        except _Interrupted as stop:
            return stop.x
