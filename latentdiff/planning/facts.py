"""Facts and warnings that need no training step."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import nn

from latentdiff.autoencoders.codec import LatentCodec
from latentdiff.config import AutoencoderConfig, DiffusionConfig, EmaConfig, LoopConfig
from latentdiff.data.shards import read_manifest
from latentdiff.errors import UserError
from latentdiff.planning.dry_run import short
from latentdiff.planning.inputs import Notes, latent_shape
from latentdiff.training import conditions
from latentdiff.training.data import Images
from latentdiff.training.latents import TOLERANCE, cache_folder

ENCODED, PATIENCE = 256, 5.0  # images encoded to time it and to look at the normaliser, and seconds after which to stop
HALF = 2  # bytes of a cached number


def data_facts(config: AutoencoderConfig | DiffusionConfig, images: Images | None, shape: Any) -> dict[str, Any]:
    """shape: of the tensors, (C, H, W), or None."""
    facts: dict[str, Any] = {"source": config.data.source}
    if images is not None:
        count = len(images.train)
        facts |= {"images": count, "held_out": len(images.held_out), "classes": len(images.class_names)}
        facts["epochs"] = short(config.train.steps * config.train.batch_size / count)
    return {"data": facts | ({"tensor": list(shape)} if shape else {})}


def parameters(**modules: nn.Module | None) -> dict[str, int]:
    return {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items() if module is not None}


def warn_of_ema(ema: EmaConfig, train: LoopConfig, notes: Notes) -> None:
    half_life = math.log(0.5) / math.log(ema.decay) if ema.decay > 0 else 0.0
    if half_life > train.steps:
        notes.warnings.append(
            f"ema.decay: {ema.decay:g} takes {half_life:.0f} steps to forget half, and the run has {train.steps}; with "
            f"{1 - short(1 - 0.5 ** (10 / train.steps)):g} it takes a tenth of them"
        )


def note_compile(train: LoopConfig, notes: Notes) -> None:
    if train.compile:
        notes.unknown["compile"] = "it takes minutes and writes to disk, so the steps are timed without it"


def without_impossible_guidance(config: DiffusionConfig, notes: Notes) -> DiffusionConfig:
    """The config with its guidance left open and a warning where training drops nothing, so that the rest is looked at."""
    try:
        conditions.guidance(config)
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
    size = len(images.train) * math.prod(shape) * 2 * HALF * sides  # a mean and a standard deviation
    facts: dict[str, Any] = {"latent_cache": {"folder": str(cache_folder(config)), "bytes": size, "finished": finished}}
    if not fits:
        return facts
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
