"""Sampling and decoding rates, the latency of one image, and whether the latent cache feeds the training step."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import latent_cache
import torch
from gpu_steps import seconds_a_step
from speed import timed

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "weights" / "fashion-mnist"
CACHE_BATCH = 1024


def measure(name: str, device: torch.device, clock: Any, results: Any) -> None:
    """The part of this name: see PARTS of gpu.py."""
    (sampling if name == "sampling" else cache)(device, clock, results)


def sampling(device: torch.device, clock: Any, results: Any) -> None:
    """weights/fashion-mnist as its own pipeline draws it, and its decoder alone."""
    from latentdiff.checkpoints import load
    from latentdiff.generation import set_precision
    from latentdiff.models.codec import LatentCodec

    batches, slot = ((1, 2), 0.0) if clock.dry else ((1, 16, 256, 2048), 2.5)
    call = {"num_inference_steps": 2} if clock.dry else {}
    for precision in ("float32", "bfloat16"):
        pipeline = load(MODEL).to(device)
        pipeline.set_progress_bar_config(disable=True)
        set_precision(pipeline, precision)
        for batch in batches:
            if clock.left() < 2 * slot:
                results.add(f"generate, {precision}, {batch} at a time", note="no time left")
                continue
            generator = torch.Generator().manual_seed(0)
            labels = [k % 10 for k in range(batch)]
            draw = partial(pipeline, class_labels=labels, generator=generator, output_type="pt", **call)
            seconds, _ = seconds_a_step(lambda number, draw=draw: draw(), device, clock.slot(slot))
            results.add(
                f"generate, {precision}, {batch} at a time", **{"img/s": batch / seconds, "milliseconds": 1e3 * seconds}
            )
    batch = batches[-1]
    codec = LatentCodec(load(MODEL).vae.to(device))
    z = torch.randn(batch, codec.latent_channels, 8, 8, device=device)
    for precision in ("float32", "bfloat16"):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            seconds, _ = seconds_a_step(lambda number: codec.decode(z), device, clock.slot(slot))
        results.add(f"decode, {precision}, {batch} at a time", **{"img/s": batch / seconds, "milliseconds": 1e3 * seconds})


def cache(device: torch.device, clock: Any, results: Any) -> None:
    """Latents a second onto the device: drawn from the cache on disk as training draws them, and from memory.

    Held against the training step's images a second, these two say whether the cache feeds it.
    """
    from latentdiff.data.latent_cache import open_cache
    from latentdiff.data.shuffling import stream
    from latentdiff.utils.random import randn

    batch, count = (8, 64) if clock.dry else (CACHE_BATCH, 200_000)
    slot = max(0.2, min(4.0, clock.left() / 6))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "cache"
        began = time.perf_counter()
        latent_cache.write_cache(folder, count)
        results.add("latents written", value=count, seconds=time.perf_counter() - began)
        opened = open_cache(folder)
        mean, std = opened.moments(torch.arange(min(count, 65536)))
        generator = torch.Generator().manual_seed(0)

        def from_disk(number: int) -> None:
            m, s = opened.moments(stream(count, 0, number * batch, batch))
            (m + s * randn(m.shape, generator)).to(device)

        def from_memory(number: int) -> None:
            rows = torch.randint(0, len(mean), (batch,))
            (mean[rows] + std[rows] * randn((batch, *mean.shape[1:]), generator)).to(device)

        resident_mean, resident_std = mean.to(device), std.to(device)

        def from_device(number: int) -> None:
            rows = torch.randint(0, len(mean), (batch,), device=device)
            m = resident_mean[rows]
            m + resident_std[rows] * torch.randn_like(m)

        for name, draw in (("disk", from_disk), ("memory", from_memory), ("the device's memory", from_device)):
            seconds, _ = seconds_a_step(draw, device, clock.slot(slot))
            results.add(f"from {name}", **{"img/s": batch / seconds, "milliseconds": 1e3 * seconds})
        seconds = timed(lambda: randn((batch, *mean.shape[1:]), generator), device)
        results.add("drawing the noise on the CPU", **{"img/s": batch / seconds, "milliseconds": 1e3 * seconds})
