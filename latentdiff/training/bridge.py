"""A bridge between two data sets: flow matching from the latents of one, in the place of noise, to those of the other.

The path is x_t = (1 - t) x0 + t x1, with x0 of `data` and x1 of `bridge.source`, drawn independently of each other. The network
learns E[x1 - x0 given x_t], and its ODE from t = 1 to 0 takes the one data set to the other (Rectified Flow, arXiv 2209.03003,
theorem 3.3; Stochastic Interpolants, arXiv 2209.15571, section 2). So it is a flow model whose "noise" is latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.config import DataConfig, DiffusionConfig
from latentdiff.data.latent_cache import LatentCache, build_cache
from latentdiff.data.shuffling import coin_flips, stream
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.pipelines.latent_diffusion import BRIDGE_SAMPLERS
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents, cache_folder
from latentdiff.utils.random import derive_seed, generators

WEIGHTINGS = ("none", "uncertainty")  # the others weigh by a signal-to-noise ratio, and there is no noise
# Solvers of the ODE, as BRIDGE_SAMPLERS are: those of the SDE replace the images that a bridge starts from by noise
SCHEDULERS = ("auto", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


def check(config: DiffusionConfig) -> None:
    """UserError for settings that a bridge cannot have."""
    if config.bridge is None:
        return
    for key, value, valid in (
        ("schedule", config.schedule.name, ("flow",)),
        ("prediction", config.prediction, ("flow",)),
        ("weighting", config.weighting, WEIGHTINGS),
    ):
        if value not in valid:
            raise UserError(f"{key}: {value} is for noise, and a bridge has data at both ends; valid: {', '.join(valid)}")
    sample = config.sample
    if sample.scheduler not in (None, *SCHEDULERS):
        valid = ", ".join(SCHEDULERS)
        raise UserError(f"sample.scheduler: {sample.scheduler} may add noise, and a bridge has none; valid: {valid}")
    if sample.sampler not in (None, *BRIDGE_SAMPLERS):
        raise UserError(
            f"sample.sampler: {sample.sampler} adds noise, and a bridge has none; valid: {', '.join(BRIDGE_SAMPLERS)}"
        )


def source_config(config: DiffusionConfig) -> DiffusionConfig:
    """The config of the source's images and latent cache, for a config with a bridge.

    Size, channels and framing are those of `data`. Its columns of labels and captions are not, because a bridge reads none.
    """
    bridge = config.bridge
    assert bridge is not None
    unread = {key: DataConfig.model_fields[key].default for key in ("label_column", "text_column", "caption", "pair_column")}
    data = config.data.model_copy(update={"source": bridge.source, **unread})
    cache = config.cache.model_copy(update={"folder": bridge.cache or str(cache_folder(config)) + "-source"})
    return config.model_copy(update={"data": data, "cache": cache, "bridge": None})


@dataclass
class Source:
    """The data set that a bridge starts from.

    Attributes:
        latents: its images and latent cache, with the autoencoder and normaliser of the data that the bridge ends at.
        seed: of its order, which is not that of the data.
        use_mean: take the posteriors' means.
        flips: mirror its images at random.
    """

    latents: Latents
    seed: int
    use_mean: bool
    flips: bool

    def draw(self, step: int, noise: Tensor, rows: slice, size: int) -> Tensor:
        """x1 of one process's share of a step's batch: normalised latents [B, c, h, w].

        noise: of the posteriors, standard normal [B, c, h, w]. rows: the share. size: of the global batch.
        """
        seed = derive_seed(self.seed, "bridge")  # with the data's own seed, equal data sets would come in pairs
        indices = stream(len(self.latents.cache), seed, step * size, size)[rows]
        flips = coin_flips(seed, step * size, size)[rows] if self.flips else False
        return self.latents.normalised(indices, None if self.use_mean else noise, flips)

    def held_out(self, count: int) -> Tensor:
        """x1 [count, c, h, w] of held-out images, always the same ones; they repeat where there are fewer."""
        return torch.cat([self.start(numbers) for numbers in torch.arange(count).split(128)]).cpu()

    def start(self, numbers: Sequence[int] | Tensor) -> Tensor:
        """x1 [B, c, h, w] to begin pictures of these numbers from: functions of the number alone."""
        numbers = torch.as_tensor(numbers)
        images = self.latents.images.held_out
        pixels = images.batch(numbers % len(images))[0]
        draws = generators(derive_seed(self.seed, "bridge", "held out"), numbers.tolist())
        return self.latents.codec.latents(pixels, draws, self.use_mean)

    def fingerprint(self) -> str:
        """Of the source's images, as a latent cache keeps it."""
        return self.latents.cache.manifest["identity"]["data"]


def open_images(config: DiffusionConfig, target: Images, codec: LatentCodec) -> Images | None:
    """The images of a bridge's source; None without a bridge. UserError where they have not the shape of `data`'s.

    target: the images of `data`. codec: the autoencoder.
    """
    if config.bridge is None:
        return None
    images = Images(source_config(config).data, codec.factor)
    if images.preprocess.padded_size != target.preprocess.padded_size:
        sizes = ["x".join(map(str, each.preprocess.padded_size)) for each in (images, target)]
        raise UserError(
            f"bridge.source: its images are {sizes[0]}, and those of data are {sizes[1]}; set data.size, and data.framing to "
            "crop, letterbox or resize"
        )
    return images


def open_source(
    config: DiffusionConfig,
    target: Latents,
    images: Images | None,
    accelerator: Any,
    progress: Callable[[int, int], None] | None = None,
) -> Source | None:
    """The source of a bridge, its latent cache built or opened; None without one. Every process calls this.

    target: the latents of `data`. images: from `open_images`. progress: progress(done, total) in images.
    """
    if images is None:
        return None
    cache: LatentCache = build_cache(
        target.codec,
        images.samples,
        cache_folder(source_config(config)),
        flips=config.data.flips,
        batch=config.cache.batch_size,
        shard_size=config.cache.shard_size,
        progress=images.then_print_report(progress),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        check=config.cache.check,
    )
    return Source(Latents(target.codec, images, cache), config.seed, config.cache.use_mean, config.data.flips)
