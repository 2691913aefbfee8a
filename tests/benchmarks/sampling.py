"""Images a second of weights/fashion-mnist by its own pipeline and by stock diffusers: python tests/benchmarks/sampling.py

Stock diffusers is the loop that its class-conditional examples have: the checkpoint's scheduler, both halves of the guidance in
one batch at every step, the autoencoder's decoder. Every contender makes the same classes; a round times each once, and
ratios are taken round by round. --quality N also measures the Fréchet distance of N images of each against
Fashion-MNIST, so that speeds are compared at known quality.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import reporting
import torch
from speed import timed
from torch import Tensor

ROOT = Path(__file__).parents[2]
MODEL, FEATURES = ROOT / "weights" / "fashion-mnist", ROOT / "weights" / "fashion-mnist-features"
# At about the same distance from real images: diffusers at its best setting, and what latentdiff takes for it
PEER, OURS = "diffusers, 13 steps, bfloat16", "latentdiff, dpmpp_3m, 6 steps guided to 0.3, bfloat16"
DISTANCE, REAL = "Fréchet distance", "real test images"
Draw = Callable[[list[int], int], np.ndarray]  # (classes, seed) -> uint8 [B, 28, 28, 1]


def stock(steps: int, guidance: float, precision: str, device: torch.device) -> Draw:
    """diffusers alone: its models, its scheduler, classifier-free guidance at every step."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(MODEL / "unet", torch_dtype=torch.float32).eval().to(device)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).eval().to(device)
    mean, std = (
        torch.tensor(getattr(vae.config, name), device=device).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    scheduler = DPMSolverMultistepScheduler.from_pretrained(MODEL / "scheduler")

    @torch.no_grad()
    def draw(classes: list[int], seed: int) -> np.ndarray:
        scheduler.set_timesteps(steps, device=device)
        labels = torch.tensor(classes + [10] * len(classes), device=device)
        x = torch.randn(len(classes), 8, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x, x]), t)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                told, free = unet(both, t, class_labels=labels).sample.float().chunk(2)
            x = scheduler.step(free + guidance * (told - free), t, x).prev_sample
        return pixels(vae.decode(x * std + mean).sample)

    return draw


def ours(precision: str, device: torch.device, **call: Any) -> Draw:
    """The checkpoint's pipeline with the settings of a call, or its own."""
    from latentdiff.checkpoints import load
    from latentdiff.generation import set_precision

    pipeline = load(MODEL).to(device)
    pipeline.set_progress_bar_config(disable=True)
    set_precision(pipeline, precision)

    def draw(classes: list[int], seed: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        images = pipeline(class_labels=classes, generator=generator, output_type="np", **call).images
        return (images * 255).round().astype(np.uint8)

    return draw


def pixels(decoded: Tensor) -> np.ndarray:
    """uint8 [B, 28, 28, 1] of [B, 1, 32, 32] in [-1, 1]: without the border that the data set is padded by."""
    image = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return image[:, :, 2:-2, 2:-2].permute(0, 2, 3, 1).cpu().numpy()


def contenders(device: torch.device) -> dict[str, Draw]:
    few = {"sampler": "dpmpp_3m", "num_inference_steps": 6}
    return {
        "diffusers, 20 steps, float32": stock(20, 1.2, "float32", device),
        "diffusers, 20 steps, bfloat16": stock(20, 1.2, "bfloat16", device),
        PEER: stock(13, 1.2, "bfloat16", device),
        "latentdiff, the checkpoint's default, float32": ours("float32", device),
        "latentdiff, the checkpoint's default, bfloat16": ours("bfloat16", device),
        "latentdiff, dpmpp_3m, 6 steps guided to 0.45, bfloat16": ours(
            "bfloat16", device, **few, guidance_scale=2.0, guidance_interval=(0.04, 0.45)
        ),
        OURS: ours("bfloat16", device, **few, guidance_scale=3.0, guidance_interval=(0.04, 0.3)),
    }


def add_rates(table: reporting.Table, draws: dict[str, Draw], batch: int, rounds: int, device: torch.device) -> None:
    """Columns of images a second with `batch` at a time, as multiples of diffusers' first setting and of its best one too."""
    classes = [k % 10 for k in range(batch)]
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for draw in draws.values():
        draw(classes, 0)
    for number in range(rounds):
        names = list(draws)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds[name].append(timed(partial(draws[name], classes, number), device))
    first, peer = seconds[next(iter(draws))], seconds[PEER]
    table.formats |= {f"images/s, {batch} at a time": "{:.2f}", f"ratio at {batch}": "{:.2f}", f"to best at {batch}": "{:.2f}"}
    for name, times in seconds.items():
        table.rows[name] |= {
            f"images/s, {batch} at a time": [batch / s for s in times],
            f"ratio at {batch}": [other / s for other, s in zip(first, times, strict=True)],
            f"to best at {batch}": [other / s for other, s in zip(peer, times, strict=True)],
        }


def distances(draws: dict[str, Draw], count: int) -> dict[str, float]:
    """Fréchet distance of `count` class-balanced images of each, and of as many real test images."""
    from latentdiff.evaluation.compare_samplers import SamplerBenchmark

    bench = SamplerBenchmark(MODEL, "fashion-mnist", count, FEATURES, "float32", 100)
    found = {REAL: bench.reference.floor}
    for name, draw in draws.items():
        parts = [bench.labels[start : start + 100] for start in range(0, count, 100)]
        images = np.concatenate([draw(part.tolist(), 1000 + k) for k, part in enumerate(parts)])
        found[name] = bench.reference.measure(images, bench.labels)[0]
    return found


def tables(arguments: argparse.Namespace) -> list[reporting.Table]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    draws = contenders(device)
    about = {"threads": torch.get_num_threads(), "rounds": arguments.rounds}
    table = reporting.Table("Sampling weights/fashion-mnist", {}, {name: {} for name in draws}, about)
    add_rates(table, draws, 1, 3 * arguments.rounds, device)
    add_rates(table, draws, 64, arguments.rounds, device)
    table.formats[DISTANCE] = "{:.4f}"
    if arguments.quality:
        for name, distance in distances(draws, arguments.quality).items():
            table.rows.setdefault(name, {})[DISTANCE] = [distance]
    return [table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    reporting.command(parser, tables, later=["--quality", "0"])


if __name__ == "__main__":
    main()
