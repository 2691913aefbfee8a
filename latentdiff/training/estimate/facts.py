"""Facts and warnings that need no training step."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import nn

from latentdiff.config import AutoencoderConfig, DiffusionConfig, LoopConfig
from latentdiff.data.tensor_shards import read_manifest
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.training import conditioning, notices
from latentdiff.training.estimate.dry_run import short
from latentdiff.training.estimate.inputs import Notes, latent_shape
from latentdiff.training.images import Images
from latentdiff.training.latents import TOLERANCE, cache_bytes, cache_folder

ENCODED, PATIENCE = 256, 5.0  # images encoded to time it and to look at the normaliser, and seconds after which to stop
DAY = 24.0  # hours: what is more of a CPU is warned of


def data_facts(config: AutoencoderConfig | DiffusionConfig, images: Images | None, shape: Any, notes: Notes) -> dict[str, Any]:
    """shape: of the tensors, (C, H, W), or None. Warns where the run's length does not suit the number of images."""
    facts: dict[str, Any] = {"source": config.data.source}
    if images is not None:
        count = len(images.train)
        facts |= images.facts() | {"classes": len(images.class_names)}
        notes.warnings += [f"data {config.data.source}: {line}" for line in images.lines()[1:]]  # the first one only counts
        facts["epochs"] = short(config.train.steps * config.train.batch_size / count)
        notes.warnings += notices.data_warnings(config, count)
    return {"data": facts | ({"tensor": list(shape)} if shape else {})}


def parameters(**modules: nn.Module | None) -> dict[str, int]:
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items() if module is not None}


def warn_of_time(config: AutoencoderConfig | DiffusionConfig, facts: dict[str, Any], notes: Notes) -> None:
    """Say how long the run takes here, and warn where that is days of a CPU."""
    hours, step = facts.get("hours"), facts.get("step")
    if hours is None or step is None:
        return
    parts = " and ".join(f"{value:.2g} h of {name}" for name, value in hours.items())
    where = f"{step['device']}, {step['threads']} CPU thread(s), {step['precision']}"
    notes.say(f"on this machine ({where}) the run takes {parts}")
    if step["device"] != "cpu" or hours["training"] <= DAY:
        return
    steps = int(config.train.steps * DAY / hours["training"])
    narrower = "a smaller data.size" + (" or model.config.block_out_channels" if config.model.pretrained is None else "")
    notes.warnings.append(
        f"train.steps: the run takes {hours['training'] / DAY:.1f} days of this CPU; {steps} steps take one. Lower it, set "
        f"{narrower}, or train on a GPU"
    )


def note_compile(train: LoopConfig, notes: Notes) -> None:
    if train.compile:
        notes.unknown["compile"] = "it takes minutes and writes to disk, so the steps are timed without it"


def without_impossible_guidance(config: DiffusionConfig, notes: Notes) -> DiffusionConfig:
    """The config with its guidance left open and a warning where training drops nothing, so that the rest is looked at."""
    try:
        conditioning.guidance(config)
        return config
    except UserError as error:
        notes.warnings.append(str(error))
        return config.model_copy(update={"sample": config.sample.model_copy(update={"guidance": None})})


def encoding(config: DiffusionConfig, codec: LatentCodec, images: Images | None, notes: Notes, trained: bool) -> dict[str, Any]:
    """Size of the latent cache and hours to build it. trained: whether the codec's latents mean anything yet."""
    name, given = f"autoencoder {config.autoencoder}", codec.vae.config
    keys = "(scaling_factor, or latents_mean and latents_std, in its config.json)"
    stored = getattr(given, "latents_mean", None) or getattr(given, "scaling_factor", None)
    looked_at = trained and config.normaliser == "stored"
    if looked_at and not stored:
        notes.warnings.append(f"{name}: has no normaliser {keys}; set normaliser=measured")
    fits = codec.image_channels == config.data.channels
    if not fits:
        notes.warnings.append(f"data.channels: {config.data.channels}, but the {name} takes {codec.image_channels}")
    if images is None:
        return {}
    shape = latent_shape(codec, (config.data.channels, *images.preprocess.padded_size))
    sides, finished = 1 + config.data.flips, read_manifest(cache_folder(config)) is not None
    size = cache_bytes(config, images, shape)
    facts: dict[str, Any] = {"latent_cache": {"folder": str(cache_folder(config)), "bytes": size, "finished": finished}}
    if not fits:
        return facts
    notes.say.release()
    notes.say("encoding a few images, for the time it takes")
    rms, seconds = _encode_some(codec, images)
    if looked_at and stored and not 1 / TOLERANCE <= rms <= TOLERANCE:
        notes.warnings.append(
            f"{name}: its normaliser {keys} gives latents of this data a root mean square of {rms:.3g} instead of 1; set "
            "normaliser=measured"
        )
    return facts | {"hours": {"encoding": 0.0 if finished else short(seconds * len(images.train) * sides / 3600)}}


@torch.no_grad()
def _encode_some(codec: LatentCodec, images: Images) -> tuple[float, float]:
    """(root mean square of normalised latents, seconds an image) over a few images spread over the data."""
    n, began = len(images.train), time.perf_counter()
    squares, seconds = [], []
    for rows in torch.linspace(0, n - 1, min(n, ENCODED)).long().split(16):
        start = time.perf_counter()
        mean, std = codec.moments(images.train.batch(rows)[0])
        squares.append(float(codec.normalise(mean + std * torch.randn_like(mean)).square().mean()))
        seconds.append((time.perf_counter() - start) / len(rows))
        if time.perf_counter() - began > PATIENCE:
            break
    return math.sqrt(statistics.mean(squares)), statistics.median(seconds)
