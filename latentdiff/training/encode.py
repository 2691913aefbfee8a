"""`latentdiff encode`: builds the latent cache of a stage-2 config before training."""

from __future__ import annotations

import sys
from pathlib import Path

from latentdiff.errors import UserError
from latentdiff.utils import signals
from latentdiff.utils.deprecation import renamed


@renamed(config_path="config")
def encode_dataset(
    config: str | Path, overrides: list[str] | None = None, progress: bool = True, part: str | None = None
) -> Path:
    """Build the latent cache of a diffusion config, and that of a bridge's source, or finish one that was interrupted.

    Of a discrete config the cache holds codes. With a second image (condition.type: image) its own cache is built too. A signal
    ends it after a shard; the same call goes on.

    Args:
        config: a YAML file whose stage is diffusion or discrete.
        overrides: values that replace the file's, as key=value, such as cache.folder=latents.
        progress: show a progress bar on stderr.
        part: "K/N", with K from 1 to N: build every N-th shard alone, as one of N jobs that share the folder. The job that
            finds no shard missing finishes the cache.

    Returns:
        The cache's folder.

    Raises:
        UserError: a mistake in the config, data or an autoencoder that cannot be used, or another job that encodes there.
    """
    from latentdiff.checkpoints import resolve_config
    from latentdiff.config import DiffusionConfig, DiscreteConfig, load_config
    from latentdiff.models.unet import check_unet, check_unet_size
    from latentdiff.training import bridge, image_conditions, messages
    from latentdiff.training.accelerator import announcement, start_accelerator
    from latentdiff.training.latents import (
        cache_folder,
        cache_size,
        cached_shape,
        encode_part,
        open_inputs,
        prepare_latents,
        progress_bar,
    )

    file, config = config, load_config(resolve_config(config), overrides or [])
    if not isinstance(config, DiffusionConfig | DiscreteConfig):
        raise UserError(f"{file}: stage is {config.stage}; encode takes a config whose stage is diffusion or discrete")
    job = None if part is None else _part(part)
    check_unet(config)
    accelerator = start_accelerator(config.train)
    opened = open_inputs(config, accelerator.device)
    codec, images = opened
    image_conditions.check_images(config, images)
    # Latents that the U-Net cannot take are not worth the time
    check_unet_size(config, cached_shape(config, codec, images), codec.factor)
    source_images = bridge.open_images(config, images, codec)
    lines = [*messages.as_warnings(messages.autoencoder_warnings(config.autoencoder)), cache_size(config, *opened)]
    # A frozen autoencoder always runs in float32, whatever the precision of training
    announce = announcement(accelerator, config.train, "float32", "encode", lines)
    if job is not None:
        with signals.watched(signals.again), progress_bar("encoding", progress, announce) as report:
            missing = encode_part(config, job[0] - 1, job[1], opened, report)
            if source_images is not None:
                source = bridge.source_config(config)
                missing += encode_part(source, job[0] - 1, job[1], (codec, source_images), report)
            missing += image_conditions.encode_part(config, job[0] - 1, job[1], opened, report)
        done = f"{missing} shards of other parts are missing" if missing else "the cache is finished"
        print(f"part {part}: {done}", file=sys.stderr)
        return cache_folder(config)
    shown = progress and accelerator.is_main_process
    with signals.watched(signals.again), progress_bar("encoding", shown, announce) as report:
        latents = prepare_latents(config, accelerator, report, opened)
        bridge.open_source(config, latents, source_images, accelerator, report)
        image_conditions.prepare(config, latents, accelerator, report)
    latents.images.print_report()
    return cache_folder(config)


def _part(text: str) -> tuple[int, int]:
    """(K, N) of "K/N"."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--part {text}: write it as K/N with K from 1 to N, such as 1/4")
    return int(number), int(count)
