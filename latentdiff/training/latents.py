"""The latents of a stage-2 config: the frozen autoencoder, the latent cache, and a check of the latent normaliser."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.config import ClassifierConfig, DiffusionConfig, DiscreteConfig
from latentdiff.data.latent_cache import LatentCache, build_cache, build_part
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import autoencoder_folder, load_autoencoder, set_normaliser
from latentdiff.models.codec import LatentCodec
from latentdiff.models.image_condition import image_condition
from latentdiff.training.images import Images
from latentdiff.utils import progress_bars

LatentConfig = DiffusionConfig | DiscreteConfig | ClassifierConfig  # the stages that train on a cache
CHECKED = 1024  # latents that the normaliser is checked on
TOLERANCE = 1.25  # their root mean square may differ from 1 by this factor


def encode_part(
    config: LatentConfig,
    rank: int,
    world: int,
    opened: tuple[LatentCodec, Images],
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Build one of `world` parts of a config's latent cache; returns how many shards of the cache are still missing.

    Parts can be built at any time and on any machine. The call after which none is missing marks the cache as finished.

    Args:
        config: of the run.
        rank: number of the part, from 0 to world - 1.
        world: number of parts.
        opened: what `open_inputs` gave.
        progress: progress(done, total) in images.
    """
    codec, images = opened
    missing = build_part(
        codec,
        images.samples,
        cache_folder(config),
        config.data.flips,
        config.cache.batch_size,
        "float16",
        config.cache.shard_size,
        images.then_print_report(progress),
        rank,
        world,
        isinstance(config, DiscreteConfig),
    )
    return len(missing)


@dataclass
class Latents:
    """The training data of stage 2: the autoencoder, the images, and the cache of their latents."""

    codec: LatentCodec
    images: Images
    cache: LatentCache

    def normalised(self, indices: Tensor, noise: Tensor | None, flips: Tensor | bool) -> Tensor:
        """Normalised latents [B, c, h, w] of training images: mean + std * noise, or the mean where noise is None.

        indices: of the images, int64 [B]. noise: standard normal, [B, c, h, w]. flips: which images are mirrored, bool [B]
        or one for all.
        """
        mean, std = self.cache.moments(indices, flips)
        return self.codec.normalise(mean if noise is None else mean + std * noise)


def cache_folder(config: LatentConfig) -> Path:
    """Where the cache of a config is: cache.folder, or latents/ (of codes: codes/) in its output folder."""
    name = "codes" if isinstance(config, DiscreteConfig) else "latents"
    return Path(config.cache.folder or Path(config.output) / name)


def prepare_latents(
    config: LatentConfig,
    accelerator,
    progress: Callable[[int, int], None] | None = None,
    opened: tuple[LatentCodec, Images] | None = None,
) -> Latents:
    """Load the autoencoder, build or open the latent cache, and check the normaliser. Every process calls this.

    Of a discrete config the cache is one of codes, which have no normaliser.

    Args:
        config: of the run.
        accelerator: of accelerate: device and processes.
        progress: progress(done, total) in images, while they are encoded.
        opened: what `open_inputs` gave, where the caller has called it already.

    Raises:
        UserError: the cache is damaged, or of another autoencoder, preprocessing or data; or the stored normaliser does
            not fit the latents.
    """
    codec, images = opened or open_inputs(config, accelerator.device)
    cache = build_cache(
        codec,
        images.samples,
        cache_folder(config),
        flips=config.data.flips,
        batch=config.cache.batch_size,
        shard_size=config.cache.shard_size,
        progress=images.then_print_report(progress),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        check=config.cache.check,
        codes=isinstance(config, DiscreteConfig),
    )
    if isinstance(config, DiscreteConfig):
        return Latents(codec, images, cache)
    if config.normaliser == "measured":
        statistics = cache.statistics()
        set_normaliser(codec.vae, statistics.mean, statistics.std)
        codec = LatentCodec(codec.vae)
    latents = Latents(codec, images, cache)
    if not (config.normaliser == "stored" and goes_on_with_both(config)):
        check_normaliser(latents, config.autoencoder)
    return latents


def goes_on_with_both(config: DiffusionConfig | ClassifierConfig) -> bool:
    """Whether autoencoder and model.pretrained are of one pipeline: then the U-Net knows its normaliser, right or not."""
    start = getattr(config.model, "pretrained", None)
    own = None if start is None else autoencoder_folder(start)
    used = autoencoder_folder(config.autoencoder)
    return own is not None and used is not None and own.resolve() == used.resolve()


def open_inputs(config: LatentConfig, device: torch.device) -> tuple[LatentCodec, Images]:
    """(the frozen autoencoder on its device, the images in the form that it takes); nothing is encoded yet.

    UserError where either cannot be opened, the number of image channels differs, or a discrete config names an autoencoder
    without a codebook.
    """
    codec = LatentCodec(load_autoencoder(config.autoencoder).to(device))
    if codec.image_channels != config.data.channels:
        raise UserError(
            f"data.channels: {config.data.channels}, but the autoencoder {config.autoencoder} takes {codec.image_channels}"
        )
    check_codebook(config, codec)
    return codec, Images(config.data, codec.factor)


def check_codebook(config: LatentConfig, codec: LatentCodec) -> None:
    """UserError where a discrete config names an autoencoder without a codebook."""
    if isinstance(config, DiscreteConfig) and codec.num_codes is None:
        raise UserError(
            f"autoencoder {config.autoencoder}: {type(codec.vae).__name__} has no codebook, and stage discrete needs one; name "
            "one with codes, such as configs/fashion-mnist/autoencoder-codes.yaml trains, or set stage: diffusion"
        )


def code_shape(codec: LatentCodec, height: int, width: int) -> tuple[int, int, int]:
    """(L, h, w) of the codes of an image of height x width pixels: L levels of the quantiser."""
    return codec.code_levels, *codec.latent_shape(height, width)[1:]


def shape_of(config: LatentConfig, codec: LatentCodec, height: int, width: int) -> tuple[int, int, int]:
    """(c, h, w) of what the model of a config draws for an image of height x width pixels: latents, or (L, h, w) of codes."""
    shape = code_shape if isinstance(config, DiscreteConfig) else LatentCodec.latent_shape
    return shape(codec, height, width)


def cached_shape(config: LatentConfig, codec: LatentCodec, images: Images) -> tuple[int, int, int]:
    """(c, h, w) of what the cache of a config holds of each image: latents, or (L, h, w) of codes."""
    return shape_of(config, codec, *images.preprocess.padded_size)


def cache_bytes(config: LatentConfig, count: int, latent_shape: tuple[int, int, int]) -> int:
    """Bytes of the latent cache of `count` images: mean and deviation in float16, of mirrored images too with data.flips.

    With a second image the means of its cache count too. Codes take 4 bytes each.
    """
    if isinstance(config, DiscreteConfig):
        return count * math.prod(latent_shape) * 4 * (1 + config.data.flips)
    condition = image_condition(config.condition) if isinstance(config, DiffusionConfig) else None
    moments = 2 + (condition.draws if condition else 0)
    return count * math.prod(latent_shape) * 2 * moments * (1 + config.data.flips)


def cache_size(config: DiffusionConfig | DiscreteConfig, codec: LatentCodec, images: Images) -> str:
    """One line, for the user, on the disk space in MiB that the latent cache needs. It begins "warning:" where less is free.

    codec: the autoencoder. images: of the run. Nothing is printed.
    """
    folder = cache_folder(config)
    size = cache_bytes(config, len(images.samples), cached_shape(config, codec, images))
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    what = "codes" if isinstance(config, DiscreteConfig) else "latents"
    line = f"{what} of {len(images.samples)} images into {folder}: {size / 2**20:.3g} MiB"
    return line if size < free else f"warning: {line}, and only {free / 2**20:.3g} MiB are free there"


def check_normaliser(latents: Latents, name: str) -> None:
    """UserError unless normalised latents have a root mean square near 1, which the noise schedule assumes.

    name: of the autoencoder, for the message.
    """
    n = len(latents.cache)
    indices = torch.linspace(0, n - 1, min(n, CHECKED)).long()
    noise = torch.randn((len(indices), *latents.cache.latent_shape), generator=torch.Generator().manual_seed(0))
    rms = float(latents.normalised(indices, noise, False).square().mean().sqrt())
    if not 1 / TOLERANCE <= rms <= TOLERANCE:
        raise UserError(
            f"autoencoder {name}: its normaliser (scaling_factor, or latents_mean and latents_std in its config.json) "
            f"gives latents of this data a root mean square of {rms:.3g} instead of 1; set normaliser=measured to "
            "measure it on this data"
        )


@contextmanager
def progress_bar(text: str, enabled: bool, before: Callable[[], None]) -> Iterator[Callable[[int, int], None]]:
    """Yields a progress(done, total) function that shows a bar on stderr, once the work takes longer than a moment.

    Args:
        text: what the bar is called.
        enabled: False shows no bar.
        before: called before each report. What it prints first stands above the bar, and is not printed where a mistake is
            found before there is any progress.
    """
    with progress_bars.bar(unit="image", desc=text, delay=0.5, disable=not enabled) as bar:

        def report(done: int, total: int) -> None:
            before()
            bar.total = total
            bar.update(done - bar.n)

        yield report
