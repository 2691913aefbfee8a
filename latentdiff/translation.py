"""Translation of images between two classes, prompts, models or data sets, by ordinary differential equations.

Through the shared Gaussian: the probability-flow ODE of A takes an image to noise, and that of B takes the noise to an image.
Both models end at the same Gaussian, so B need not know A (Dual Diffusion Implicit Bridges, DDIB, arXiv 2203.08382).

Through a bridge: a model that was trained by flow matching between two data sets takes an image of the one to the other in one
go (`bridge` in a diffusion config). It needs no noise.

`translate`, `cycle_error` and `interpolate` work on any data, with any denoisers. `translate_images` and `interpolate_images`
do the same with images and pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff import samplers
from latentdiff.checkpoints import refuse_bridge
from latentdiff.denoiser import Denoised, Denoiser, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance import ClassifierFree
from latentdiff.guidance.operators import BLACK, with_border
from latentdiff.models.codec import LatentCodec
from latentdiff.samplers.grids import make_grid
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.random import Generators
from latentdiff.utils.tensors import flat_mean, widen

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline


# Any data, any denoisers


def translate(
    source: DenoiserLike,
    target: DenoiserLike,
    x0: Tensor,
    sampler: str = "heun",
    steps: int = 50,
    strength: float = 1.0,
    grid: str = "angle",
    grid_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Data of `target` [B, ...] with the noise that the ODE of `source` ties to x0 (DDIB, arXiv 2203.08382, algorithm 1).

    Between two Gaussians N(m, C) and N(m', C') whose schedules end on pure noise this is x -> m' + C'^(1/2) C^(-1/2) (x - m).
    Nothing is drawn, and each sample is translated on its own.

    Args:
        source: the denoiser of what x0 is, or guidance around one. Guidance makes the way to noise less exact.
        target: the denoiser of what x0 becomes.
        x0: data [B, ...].
        sampler: "heun", "dopri5" or "euler", in both directions.
        steps: steps of each direction, at strength 1; dopri5 takes as many as it needs.
        strength: the time, in (0, 1], up to which x0 is taken. 1 is noise. Below, the result keeps more of x0, and fewer of
            the steps are taken. The two schedules then meet at the same signal-to-noise ratio.
        grid: a name of `latentdiff.samplers.grids`, for both schedules.
        grid_options, options: as in `samplers.encode`.

    Raises:
        UserError: an unknown sampler, grid or option, or a strength that is not in (0, 1].
        NotFiniteError: a result that is not finite.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength: {strength:g}: must be above 0 and at most 1, which is all the way to noise")
    up = _times(source.schedule, strength, steps, grid, grid_options)
    noise = samplers.encode(source, x0, sampler, grid=up, **options)
    end = 1.0
    if strength < 1:
        # Both states are in units of `start_std`, so at one signal-to-noise ratio they are the same
        end = float(target.schedule.time_from_log_snr(source.schedule.log_snr(float(up[0]))))
    down = _times(target.schedule, end, steps, grid, grid_options)
    return samplers.sample(target, noise, sampler, grid=down, **options)


def cycle_error(source: DenoiserLike, target: DenoiserLike, x0: Tensor, **options: Any) -> Tensor:
    """Root mean square of x0 translated there and back, minus x0, over the entries of each sample: [B], in the units of x0.

    With exact denoisers and many steps it goes to 0 (DDIB, arXiv 2203.08382, section 4). What remains is the error of the
    solver and of the networks: it says how far a translation can be trusted.

    Args:
        source, target, x0: as in `translate`.
        options: those of `translate`.
    """
    there = translate(source, target, x0, **options)
    back = translate(target, source, there, **options)
    return flat_mean((back - x0) ** 2).sqrt()


def interpolate(
    source: DenoiserLike,
    a: Tensor,
    b: Tensor,
    weights: Sequence[float],
    target: DenoiserLike | None = None,
    sampler: str = "heun",
    steps: int = 50,
    grid: str = "angle",
    grid_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Data between a and b: `samplers.slerp` of their noises, taken back to data. [K, B, ...] for K weights.

    The way from DDIM (arXiv 2010.02502, section 5.3), for data in the place of drawn noise. At weight 0 it is a, and at weight
    1 b, up to `samplers.round_trip_error`.

    Args:
        source: the denoiser of a and b.
        a, b: data [B, ...].
        weights: K numbers; 0 is a and 1 is b.
        target: the denoiser of the result; None: `source`.
        sampler, steps, grid, grid_options, options: as in `samplers.encode`.
    """
    way = {"sampler": sampler, "steps": steps, "grid": grid, "grid_options": grid_options, **options}
    first, last = (samplers.encode(source, x0, **way) for x0 in (a, b))
    # One weight at a time, because a condition of the denoiser has B rows
    return torch.stack([samplers.sample(target or source, samplers.slerp(first, last, weight), **way) for weight in weights])


class Between:
    """The weighted mean of two denoisers' estimates: (1 - weight) first + weight last, for each sample with its own weight.

    The score is then that of the density proportional to p_first^(1 - weight) p_last^weight at each noise level.

    first, last: denoisers with one schedule, or guidance around them. weights: [B], 0 gives first and 1 gives last.
    """

    def __init__(self, first: DenoiserLike, last: DenoiserLike, weights: Tensor):
        self.first, self.last, self.weights = first, last, weights
        self.schedule = first.schedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The estimates at x [B, ...] and t (a float or [B]), as `Denoised`. conditioning: given to both."""
        one, other = self.first(x, t, **conditioning), self.last(x, t, **conditioning)
        weight = widen(self.weights, one.x0)
        x0 = one.x0 + weight * (other.x0 - one.x0)
        return Denoised(x0, one.eps + weight * (other.eps - one.eps), self.schedule, one.t)


def _times(schedule: NoiseSchedule, end: float, steps: int, grid: str, grid_options: Mapping[str, Any] | None) -> Tensor:
    """The times of a grid from `end` down, float64 [n + 1]; the whole grid for end = 1, fewer steps below."""
    times = make_grid(grid, schedule, steps, grid_options)
    if end >= float(times[0]):
        return times
    return torch.cat([torch.tensor([end], dtype=torch.float64), times[times < end]])


# Images and pipelines


@torch.no_grad()
def translate_images(
    pipeline: LatentDiffusionPipeline,
    images: Tensor,
    source: Sequence[str | int | None] = (None,),
    to: Sequence[str | int | None] = (None,),
    into: LatentDiffusionPipeline | None = None,
    steps: int = 50,
    strength: float = 1.0,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    source_guidance: float = 1.0,
    away: Sequence[str | int | None] | None = None,
    sampler: str = "heun",
    generator: Generators = None,
    use_mean: bool = False,
) -> Tensor:
    """Images [B, C, H, W] in [-1, 1], translated: through the shared Gaussian, or by a bridge where the pipeline is one.

    Args:
        pipeline: the model of the images; for a bridge, the bridge.
        images: [B, C, H, W] in [-1, 1], of the size of the model's images.
        source: what the images show: a class (name or number), a prompt, or None for nothing in particular. One entry for
            all, or one for each image. A bridge takes none.
        to: what they become, in the same way.
        into: the model that makes the result; None: the same. Both models must be over one autoencoder.
        steps: steps of each direction.
        strength: as in `translate`: below 1 more of the image is kept. A bridge has none.
        guidance: scale of classifier-free guidance towards `to`; None: the model's default.
        guidance_interval: (low, high) in t, where to guide; None: the model's default. That is often the middle alone, while a
            class is decided at high noise: (0, 1) guides all the way.
        source_guidance: the same on the way to noise. 1 is off: other values make that way less exact.
        away: what guidance leads away from, as `source`. None: from `source` itself, or from nothing in particular for a second
            model. What `source` and `to` have in common is then not pushed, so more of the image stays.
        sampler: "heun", "dopri5" or "euler".
        generator: draws from the autoencoder's posterior: one, or a list with one per image; see `utils.random.randn`.
        use_mean: take the posterior's mean instead, for a model that was trained on means (cache.use_mean).

    Raises:
        UserError: models over two autoencoders, images of another size, an unknown class, or an option out of range.
    """
    check_models(pipeline, into, strength, source)
    z = encode_images(pipeline, images, generator, use_mean)
    result = into or pipeline
    away = away if away is not None else source if into is None else (None,)
    after = conditional_denoiser(result, to, len(z), guidance, guidance_interval, away=away)
    if pipeline.config.get("bridge") is not None:
        return decode_latents(result, samplers.sample(after, z, sampler, grid=_whole(steps)))
    before = conditional_denoiser(pipeline, source, len(z), source_guidance)
    return decode_latents(result, translate(before, after, z, sampler, steps, strength))


@torch.no_grad()
def cycle_error_of_images(
    pipeline: LatentDiffusionPipeline,
    images: Tensor,
    source: Sequence[str | int | None] = (None,),
    to: Sequence[str | int | None] = (None,),
    into: LatentDiffusionPipeline | None = None,
    steps: int = 50,
    strength: float = 1.0,
    sampler: str = "heun",
    generator: Generators = None,
    use_mean: bool = False,
) -> Tensor:
    """`cycle_error` of images [B, C, H, W] in [-1, 1], in their normalised latents (of unit variance): [B].

    Without guidance, which is another ODE in each direction. A bridge runs to its other end and back. Arguments and errors as
    in `translate_images`.
    """
    check_models(pipeline, into, strength, source)
    z = encode_images(pipeline, images, generator, use_mean)
    after = conditional_denoiser(into or pipeline, to, len(z), 1.0)
    if pipeline.config.get("bridge") is not None:
        there = samplers.sample(after, z, sampler, grid=_whole(steps))
        return flat_mean((samplers.encode(after, there, sampler, grid=_whole(steps)) - z) ** 2).sqrt()
    before = conditional_denoiser(pipeline, source, len(z), 1.0)
    return cycle_error(before, after, z, sampler=sampler, steps=steps, strength=strength)


@torch.no_grad()
def interpolate_images(
    pipeline: LatentDiffusionPipeline,
    a: Tensor,
    b: Tensor,
    weights: Sequence[float],
    what: Sequence[str | int | None] = (None,),
    steps: int = 50,
    sampler: str = "heun",
    generator: Generators = None,
    use_mean: bool = False,
    what_of_b: Sequence[str | int | None] | None = None,
    generator_of_b: Generators = None,
    label: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Images between images a and b [B, C, H, W] in [-1, 1]: [K, B, C, H, W] for K weights, 0 for a and 1 for b.

    Both are encoded by the probability-flow ODE, their noises interpolated (`samplers.slerp`, DDIM, arXiv 2010.02502, section
    5.3), and each is decoded by the same ODE. There is no guidance, so that the ends are a and b as the model keeps them.

    Args:
        pipeline, steps, sampler, use_mean: as in `translate_images`.
        a, b: [B, C, H, W] in [-1, 1], of the model's size.
        weights: K numbers; 0 is a and 1 is b.
        what: what both show, or a alone, as `source` of `translate_images`.
        generator: draws from the posterior for a, then for b.
        what_of_b: what b shows, where that is something else. The estimates are then those of `Between`.
        generator_of_b: draws for b instead.
        label: the class of every prompt, of a model with both.
        batch_size: images made at a time; None: B.

    Raises:
        UserError: images of another size, an unknown class, or a bridge, which has no noise.
    """
    refuse_bridge(pipeline, "MODEL")
    count, shown = len(a), [what, what if what_of_b is None else what_of_b]
    for entries in shown:
        _check_count(entries, count)
    draws = [generator, generator if generator_of_b is None else generator_of_b]

    def denoisers(rows: Tensor) -> list[DenoiserLike]:
        """One for what each end shows, of some of the K B results; one where both show the same."""
        each = [[entries[i] for i in (rows % count).tolist()] if len(entries) > 1 else [*entries] for entries in shown]
        different = each if each[0] != each[1] else each[:1]
        return [conditional_denoiser(pipeline, entries, len(rows), 1.0, label=label) for entries in different]

    ends = denoisers(torch.arange(count))
    latents = [encode_images(pipeline, x, draw, use_mean) for x, draw in zip((a, b), draws, strict=True)]
    both = zip((ends[0], ends[-1]), latents, strict=True)
    noises = [samplers.encode(end, z, sampler, steps) for end, z in both]
    amounts = torch.tensor([*weights], dtype=torch.float64).repeat_interleave(count)  # [K B]
    made = []
    for rows in torch.arange(len(amounts)).split(batch_size or count):
        first, *last = denoisers(rows)
        noise = samplers.slerp(noises[0][rows % count], noises[1][rows % count], amounts[rows].to(latents[0]))
        mixed = Between(first, last[0], amounts[rows]) if last else first
        made.append(decode_latents(pipeline, samplers.sample(mixed, noise, sampler, steps)))
    return torch.cat(made).unflatten(0, (len(weights), count))


def conditional_denoiser(
    pipeline: LatentDiffusionPipeline,
    what: Sequence[str | int | None],
    count: int,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    label: int | None = None,
    away: Sequence[str | int | None] = (None,),
) -> DenoiserLike:
    """The denoiser of a pipeline for `count` samples of normalised latents, conditioned and guided.

    what: a class or a prompt for each sample, or one for all; None is nothing in particular. guidance: the scale, and
    guidance_interval: where to guide, (low, high) in t; None: the pipeline's defaults. label: the class of every prompt, of a
    model with both. away: what guidance leads away from, as `what`. UserError for an unknown class, or another number of
    entries than 1 or `count`.
    """
    prompts, classes = _split(pipeline, what, count, label)
    no_prompts, no_classes = _split(pipeline, away, count, label)
    named = no_classes if any(entry is not None for entry in no_classes) else None  # None: no class, as the pipeline names it
    try:
        texts, labels, no_texts, no_labels = pipeline.match_inputs(prompts, classes, no_prompts, named)
        scale = pipeline.match_guidance_scale(guidance, texts, labels, no_texts, no_labels)
    except ValueError as error:  # PipelineInputError, in one line
        raise UserError(str(error)) from None
    positive = pipeline.conditioning(texts, labels)
    negative = pipeline.conditioning(no_texts, no_labels) if scale != 1 else {}
    interval = pipeline.config.get("default_guidance_interval") if guidance_interval is None else guidance_interval
    return ClassifierFree(Denoiser.from_pipeline(pipeline), positive, negative, scale, interval=interval)


def _split(
    pipeline: LatentDiffusionPipeline, what: Sequence[str | int | None], count: int, label: int | None
) -> tuple[list[str | None], list[str | int | None]]:
    """(prompts, classes) of `count` samples; see `conditional_denoiser`."""
    _check_count(what, count)
    entries = [*what] * (count // len(what))
    reads_text = pipeline.text_encoder is not None
    is_prompt = [reads_text and isinstance(entry, str) and entry not in pipeline.class_names for entry in entries]
    prompts = [str(entry) if text else None for entry, text in zip(entries, is_prompt, strict=True)]
    classes = [label if text else entry for entry, text in zip(entries, is_prompt, strict=True)]
    return prompts, classes


def _check_count(what: Sequence[str | int | None], count: int) -> None:
    """UserError unless there is one class or prompt for all of `count` images, or one for each."""
    if len(what) not in (1, count):
        raise UserError(f"{len(what)} classes or prompts for {count} images: give one, or one for each")


def encode_images(
    pipeline: LatentDiffusionPipeline, images: Tensor, generator: Generators = None, use_mean: bool = False
) -> Tensor:
    """Normalised latents [B, c, h, w] of images [B, C, H, W] in [-1, 1]: a draw of each posterior, as in training.

    The border that training put around its images is put around these. generator: as in `utils.random.randn`. use_mean: the
    posterior's mean instead, for a model that was trained on means (cache.use_mean). UserError for images of another size than
    the model's.
    """
    codec = LatentCodec(pipeline.vae)
    tall, wide = (side * codec.factor for side in pipeline.latent_shape[1:])
    height, width = pipeline.config.image_size or (tall, wide)
    if tuple(images.shape[2:]) != (height, width):
        given = "x".join(map(str, images.shape[2:]))
        raise UserError(f"images of {given}: this model's are {height}x{width} (height x width)")
    padded = with_border(images, (tall, wide), BLACK)
    # Through one dimension, because torch may take one channel for channels-last, which is slow on a CPU
    return codec.latents(padded.reshape(-1).view(padded.shape), generator, use_mean)


def decode_latents(pipeline: LatentDiffusionPipeline, z: Tensor) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] of normalised latents [B, c, h, w], without the border that training added."""
    return pipeline.decode_latents(z, "pt").float() * 2 - 1


def check_models(
    pipeline: LatentDiffusionPipeline,
    into: LatentDiffusionPipeline | None,
    strength: float,
    source: Sequence[str | int | None],
) -> None:
    """UserError where these models cannot translate. Arguments as in `translate_images`.

    Two models must have latents of one shape, made by one encoder; their decoders may differ. They may also normalise the
    latents differently, as each ends at the Gaussian by itself, except where the way ends before it (strength below 1).
    """
    name = pipeline.config.get("bridge")
    if name is not None and (into is not None or strength != 1 or [*source] != [None]):
        raise UserError(f"MODEL: a bridge from {name} takes images alone; leave source, a second model and strength out")
    if into is None:
        return
    if into.config.get("bridge") is not None:
        raise UserError("into: a bridge does not start from noise; give it as the only model")
    a, b = LatentCodec(pipeline.vae), LatentCodec(into.vae)
    if pipeline.latent_shape != into.latent_shape or a.fingerprint(True) != b.fingerprint(True):
        raise UserError("into: the two models have different autoencoders; train both over one autoencoder")
    normalisers = ((codec.shift.tolist(), codec.scale.tolist()) for codec in (a, b))
    if strength < 1 and len({str(each) for each in normalisers}) > 1:
        raise UserError("strength: below 1 both models must normalise their latents alike; train both with normaliser=stored")


def _whole(steps: int) -> Tensor:
    """Equal steps from t = 1 to 0, float64 [steps + 1]: a bridge has data at both ends, so it starts at 1 itself."""
    if steps < 1:
        raise UserError(f"steps: {steps}: must be at least 1")
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
