"""The second image that a run gives its U-Net beside x_t: encoded once, before training, and read from a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.config import DiffusionConfig
from latentdiff.data.condition_images import ConditionImages
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.latent_cache import LatentCache, build_cache, build_part
from latentdiff.models.codec import LatentCodec
from latentdiff.models.image_condition import ImageCondition, beside, image_condition

HELD_OUT = "held out"  # what the masks of held-out images are drawn by


def condition_folder(config: DiffusionConfig) -> Path:
    """Where the encoded condition images are: condition.image.folder, or condition/ in the run's folder."""
    return Path(config.condition.image.folder or Path(config.output) / "condition")


def check_images(config: DiffusionConfig, images: Any) -> None:
    """UserError where the images of a config, or the held-out ones, have no such second image as the config says."""
    condition = image_condition(config.condition)
    if condition is not None:
        for dataset in (images.samples, images.held_out):
            ConditionImages(dataset, condition)


@dataclass
class PictureCondition:
    """The condition images of a run, in the form that the network takes.

    Attributes:
        images: of the training images.
        cache: their encoded means, one for each of `images`.
        codec: the autoencoder, for the normaliser and for images that are not in the cache.
    """

    images: ConditionImages
    cache: LatentCache
    codec: LatentCodec

    @property
    def condition(self) -> ImageCondition:
        """What the images are."""
        return self.images.condition

    @property
    def channels(self) -> int:
        """Channels that lie beside x_t."""
        return self.condition.channels(self.codec.latent_channels)

    def look_up(self, indices: Tensor, choice: Tensor, dropped: Tensor, flips: Tensor | bool) -> Tensor:
        """What lies beside x_t for training images, [B, e, h, w] on the CPU.

        Args:
            indices: of the images, int64 [B].
            choice: uniform in [0, 1), [B]: which of an image's condition images.
            dropped: which samples get zeros, bool [B].
            flips: which images are mirrored, bool [B] or one for all.
        """
        numbers = indices * self.condition.draws + (choice.double() * self.condition.draws).long()
        latents = self.codec.normalise(self.cache.moments(numbers, flips)[0])
        together = beside(latents, self.images.hidden(numbers), self.images.dataset.preprocess.padded_size)
        return torch.where(dropped[:, None, None, None], 0.0, together)

    def of_held_out(self, dataset: ImageDataset, rows: Sequence[int] | Tensor) -> tuple[Tensor, Tensor | None]:
        """(condition images, masks or None) of held-out images, as a user gives them; see `ConditionImages.given`."""
        images = ConditionImages(dataset, self.condition, HELD_OUT)
        return images.given(torch.as_tensor(rows) * self.condition.draws)

    @torch.no_grad()
    def encode(self, given: Tensor, hidden: Tensor | None, batch: int = 128) -> Tensor:
        """What lies beside x_t for condition images as a user gives them: [B, e, h, w] on the CPU; nothing is dropped."""
        preprocess, pieces = self.images.dataset.preprocess, []
        for rows in torch.arange(len(given)).split(batch):
            mask = None if hidden is None else hidden[rows]
            raw = self.condition.latents(self.codec, given[rows], mask, self.images.content, preprocess.padded_size)
            pieces.append(beside(self.codec.normalise(raw).cpu(), mask, preprocess.padded_size))
        return torch.cat(pieces)


def prepare(
    config: DiffusionConfig, latents: Any, accelerator: Any, progress: Callable[[int, int], None] | None = None
) -> PictureCondition | None:
    """The condition images of a config over its images, encoded now or opened where they are; None without any.

    Every process calls this. Arguments and errors as of `latentdiff.training.latents.prepare_latents`.
    """
    condition = image_condition(config.condition)
    if condition is None:
        return None
    images = ConditionImages(latents.images.samples, condition)
    cache = build_cache(
        latents.codec,
        images,
        condition_folder(config),
        flips=config.data.flips,
        batch=config.cache.batch_size,
        shard_size=config.cache.shard_size,
        progress=latents.images.then_print_report(progress),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        check=config.cache.check,
    )
    return PictureCondition(images, cache, latents.codec)


def encode_part(
    config: DiffusionConfig,
    rank: int,
    world: int,
    opened: tuple[LatentCodec, Any],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Build one of `world` parts of the cache of condition images; returns how many of its shards are still missing.

    Arguments as of `latentdiff.training.latents.encode_part`. 0 without condition images.
    """
    condition = image_condition(config.condition)
    if condition is None:
        return 0
    codec, images = opened
    missing = build_part(
        codec,
        ConditionImages(images.samples, condition),
        condition_folder(config),
        config.data.flips,
        config.cache.batch_size,
        "float16",
        config.cache.shard_size,
        images.then_print_report(progress),
        rank,
        world,
    )
    return len(missing)
