"""What a run reads, as far as it is there: the autoencoder, the images, and the shapes that follow from them."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from latentdiff.config import AutoencoderConfig, DataConfig, load_config, parse_config
from latentdiff.data.sources import open_source
from latentdiff.data.tables import HUB_NAME
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.models.loading import read_json
from latentdiff.training.estimate.progress import Progress
from latentdiff.training.images import Images, columns_of
from latentdiff.training.train_autoencoder import make_autoencoder


@dataclass
class Notes:
    """What a plan says in words. unknown: {part: why it is not known}; warnings: what is likely a mistake.

    say: takes a line on what the planning is doing; its release() is called once nothing is refused any more.
    """

    say: Progress
    unknown: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def is_here(where: str) -> bool:
    """Whether an autoencoder can be read without fetching it: a folder, or a Hub name that was fetched before."""
    if any((Path(where) / part / "config.json").is_file() for part in ("", "autoencoder", "vae")):
        return True
    if Path(where).exists() or where.count("/") != 1 or where.startswith((".", "/")):
        return False
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # not a name the Hub could have
        return any(isinstance(try_to_load_from_cache(where, f"{part}config.json"), str) for part in ("", "vae/"))
    return False


def first_stage(where: str, path: Path) -> tuple[LatentCodec | None, str]:
    """The autoencoder and where it is from: `where` itself, or the config that will make it there, with random weights.

    Such a config is looked for in that run's own record, beside the config at `path`, and one folder up. (None, the
    reason) where there is neither.
    """
    if is_here(where):
        return LatentCodec(load_autoencoder(where)), where
    record = Path(where) / "run.json"
    above = Path(os.path.normpath(path.parent / ".."))
    for place in (record, *sorted(path.parent.glob("*.yaml")), *sorted(above.glob("*.yaml"))):
        config = None
        with contextlib.suppress(UserError, OSError):  # another's config, which may be wrong or no config at all
            config = parse_config(read_json(place), str(place)) if place == record else load_config(place)
        if not isinstance(config, AutoencoderConfig) or (place != record and Path(config.output) != Path(where)):
            continue
        if config.model.pretrained is None or is_here(config.model.pretrained):
            return LatentCodec(make_autoencoder(config)), str(place)
    return None, f"{where}: there is none yet, and no config beside this one makes it; a Hub name is not fetched for this"


def find_images(data: DataConfig, factor: int, notes: Notes) -> Images | None:
    """The images, or None with a note where they are not there. UserError where they are, and the config misfits them."""
    notes.say(f"reading the images of {data.source}")
    there = Path(data.source).expanduser().exists()
    if not there and ("://" in data.source or HUB_NAME.fullmatch(data.source)):
        notes.unknown["data"] = f"{data.source}: no such folder; a data set of the Hub, or elsewhere, is not fetched for this"
        return None
    try:
        return Images(data, factor)
    except UserError as error:
        if there or _opens(data):
            raise
        notes.unknown["data"] = f"{error}; the number of images, and what follows from it, is not known"
        return None


def _opens(data: DataConfig) -> bool:
    try:
        open_source(data.source, "train", data.channels, data.max_bad_share, columns_of(data), data.streaming)
        return True
    except UserError:
        return False


def image_shape(data: DataConfig, images: Images | None, factor: int, notes: Notes) -> tuple[int, int, int] | None:
    """(C, H, W) of the tensors; None with a note where the config leaves the size to images that are not there."""
    multiple = math.lcm(factor, data.multiple_of)
    rule = images.preprocess if images else Preprocess(data.size, data.channels, data.framing, multiple)
    if rule.size is None:
        notes.unknown["shapes"] = "data.size is not set and the images are not there; set data.size to plan without them"
        return None
    return (data.channels, *rule.padded_size)


def latent_shape(codec: LatentCodec, image: tuple[int, int, int]) -> tuple[int, int, int]:
    return codec.latent_channels, image[1] // codec.factor, image[2] // codec.factor
