"""Training steps beside the plain loop of diffusers' examples: python tests/benchmarks/speed.py [--rounds N] [--batch B]

All contenders hold the same network (class, config, initial weights' shapes), run under bfloat16 autocast with AdamW,
gradient clipping and an average of the weights, on made-up pictures of Fashion-MNIST's shape, in one process and in turns:
a round times each once, and the table gives medians over the rounds. The machine's own bfloat16 matrix rate is measured in
the same rounds.

Stage 2: "plain, encoding" encodes each batch with the autoencoder, as the examples do; "plain, cached" holds the latents in
memory. Stage 1: "plain" is an AutoencoderKL loop with the same losses. MONAI's U-Net of the same size joins where `monai` can
be imported.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
CONFIGS, WEIGHTS = ROOT / "configs" / "fashion-mnist", ROOT / "weights" / "fashion-mnist"
Step = Callable[[int], Any]


def make_pictures(folder: Path, count: int = 2048, classes: int = 10) -> Path:
    """`count` grey 28x28 pictures in class folders."""
    draws = np.random.default_rng(0)
    for k in range(count):
        place = folder / f"class-{k % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (28, 28), dtype=np.uint8)).save(place / f"{k:05d}.png")
    return folder


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def finish(network: nn.Module, optimizer: torch.optim.Optimizer, ema: Any, loss: Tensor) -> None:
    """The rest of a plain step, as diffusers' training examples have it."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ema.step(network.parameters())


def our_stage2(data: Path, folder: Path, batch: int) -> tuple[Step, Any]:
    """The trainer's own step on cached latents; and what the trainer holds, for the others to take their parts from."""
    from latentdiff.config import load_config
    from latentdiff.training import conditions, diffusion, run
    from latentdiff.training.latents import prepare_latents

    settings = [f"data.source={data}", f"autoencoder={WEIGHTS / 'vae'}", f"output={folder / 'stage2'}", "normaliser=measured",
                f"cache.folder={folder / 'latents'}", f"train.batch_size={batch}", "sample.guidance_interval=null"]  # fmt: skip
    config = load_config(CONFIGS / "diffusion.yaml", settings)
    accelerator = run.start_accelerator(config.train)
    latents = prepare_latents(config, accelerator)
    told = conditions.prepare_conditions(config, latents, accelerator, None, False)
    parts = diffusion._parts(config, latents, told, accelerator)
    work = diffusion._work(config, parts, accelerator, folder / "stage2")
    return (lambda number: work.step(number, 1e-4)), parts


def plain_stage2(parts: Any, batch: int, encode: bool, unet: nn.Module | None = None, call: Any = None) -> Step:
    """diffusers' loop over latents in memory, or over pictures that it encodes; call(unet, x, t, labels) -> prediction."""
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    unet = (unet or UNet2DModel.from_config(parts.bare.config)).train()
    optimizer, ema = torch.optim.AdamW(unet.parameters(), lr=1e-4), EMAModel(unet.parameters(), decay=0.998)
    scheduler, vae = DDPMScheduler(), parts.latents.codec.vae
    everything = torch.arange(len(parts.latents.cache))
    labels = parts.latents.cache.labels
    cached = parts.latents.normalised(everything, None, False).contiguous()
    pictures = torch.rand(len(cached), 1, 32, 32) * 2 - 1
    call = call or (lambda unet, x, t, labels: unet(x, t, class_labels=labels).sample)

    def step(number: int) -> None:
        rows = torch.randint(0, len(cached), (batch,))
        if encode:
            with torch.no_grad(), autocast():
                x0 = vae.encode(pictures[rows]).latent_dist.sample() * 0.5
        else:
            x0 = cached[rows]
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (batch,))
        with autocast():
            output = call(unet, scheduler.add_noise(x0, noise, t), t, labels[rows])
            loss = F.mse_loss(output.float(), noise.float())
        finish(unet, optimizer, ema, loss)

    return step


def monai_stage2(parts: Any, batch: int) -> Step | None:
    """MONAI's U-Net with as many parameters, in the plain loop on cached latents; None where MONAI is not installed."""
    try:
        from monai.networks.nets import DiffusionModelUNet
    except ImportError:
        return None
    unet = DiffusionModelUNet(
        spatial_dims=2, in_channels=8, out_channels=8, channels=(128, 256), attention_levels=(False, True), num_res_blocks=2,
        num_head_channels=(0, 64), norm_num_groups=32, num_class_embeds=11,
    )  # fmt: skip
    return plain_stage2(parts, batch, False, unet, lambda unet, x, t, labels: unet(x, t, class_labels=labels))


def our_stage1(data: Path, folder: Path, batch: int) -> tuple[Step, Any]:
    from latentdiff.config import load_config
    from latentdiff.training import autoencoder, run
    from latentdiff.training.data import Images

    settings = [f"data.source={data}", f"output={folder / 'stage1'}", f"train.batch_size={batch}", "loss.perceptual=0"]
    config = load_config(CONFIGS / "autoencoder-kl.yaml", settings)
    vae = autoencoder._build(config)
    accelerator = run.start_accelerator(config.train)
    vae.train().requires_grad_(True)
    parts = autoencoder._parts(config, vae, 4, accelerator)
    images = Images(config.data, 4)
    work = autoencoder._work(config, images, parts, accelerator, folder / "stage1")
    return (lambda number: work.step(number, 1e-4)), parts


def plain_stage1(parts: Any, batch: int) -> Step:
    """A plain AutoencoderKL loop on pictures in memory: encode, sample, decode, pixel losses and KL."""
    from diffusers import AutoencoderKL
    from diffusers.training_utils import EMAModel

    vae = AutoencoderKL.from_config(parts.bare.vae.config).train()
    optimizer, ema = torch.optim.AdamW(vae.parameters(), lr=1e-4), EMAModel(vae.parameters(), decay=0.995)
    pictures = torch.rand(2048, 1, 32, 32) * 2 - 1

    def step(number: int) -> None:
        x = pictures[torch.randint(0, len(pictures), (batch,))]
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().float().mean()
        finish(vae, optimizer, ema, loss)

    return step


def matrix_rate(size: int = 2048) -> float:
    """FLOP/s of one bfloat16 matrix product of this size."""
    a = torch.randn(size, size, dtype=torch.bfloat16)
    began = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * size**3 / (time.perf_counter() - began)


def flops(step: Step) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(0)
    return float(counter.get_total_flops())


def timed(step: Step, number: int) -> float:
    began = time.perf_counter()
    step(number)
    return time.perf_counter() - began


def measure(steps: dict[str, Step], rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each step in each round, and the matrix rates; the contenders in another order each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates = []
    for step in steps.values():
        step(0)
    for number in range(1, rounds + 1):
        names = list(steps)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(timed(steps[name], number))
        rates.append(matrix_rate())
    return times, rates


def table(title: str, steps: dict[str, Step], batch: int, rounds: int) -> None:
    times, rates = measure(steps, rounds)
    rate, first = statistics.median(rates), next(iter(steps))
    work = flops(steps[first])
    print(f"\n{title}: batch {batch}, {rounds} rounds, {torch.get_num_threads()} thread(s), "
          f"matrix rate {rate / 1e12:.2f} TFLOP/s\n")  # fmt: skip
    print("| | samples/s | range | ours is so many times as fast, by round | of the matrix rate |\n|---|---|---|---|---|")
    for name, seconds in times.items():
        per = sorted(batch / s for s in seconds)
        ratios = sorted(s / o for s, o in zip(seconds, times[first], strict=True))
        share = f"{work / statistics.median(seconds) / rate:.0%}" if name == first else ""
        print(f"| {name} | {statistics.median(per):.0f} | {per[0]:.0f} to {per[-1]:.0f} | {statistics.median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {share} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_pictures(folder / "pictures")
        ours, parts = our_stage2(data, folder, args.batch)
        stage2 = {"latentdiff": ours, "plain, cached": plain_stage2(parts, args.batch, False),
                  "plain, encoding": plain_stage2(parts, args.batch, True)}  # fmt: skip
        if (theirs := monai_stage2(parts, args.batch)) is not None:
            stage2["MONAI, cached"] = theirs
        else:
            print("monai is not installed, and left out", file=sys.stderr)
        table("Stage 2, the U-Net of weights/fashion-mnist", stage2, args.batch, args.rounds)
        first, parts1 = our_stage1(data, folder, args.batch // 2)
        stage1 = {"latentdiff": first, "plain": plain_stage1(parts1, args.batch // 2)}
        title = "Stage 1, the autoencoder of weights/fashion-mnist without its perceptual loss"
        table(title, stage1, args.batch // 2, args.rounds)


if __name__ == "__main__":
    main()
