"""Training steps of both stages at three sizes, beside the plain loop of diffusers' examples at the same network.

latentdiff's steps are the trainers' own, on random latents and pictures in memory. Each setting that may make a step faster is
switched alone: channels-last memory, CUDA graphs, and an optimizer that is not fused. Compiled networks have parts of their
own.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import finisher
from gpu_card import matrix_rate
from speed import wait
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
SHAPES = {"LDM-class": (4, 32, 32), "64-pixel text model": (8, 8, 8), "weights/fashion-mnist": (8, 8, 8)}
# Of the U-Net of "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv:2112.10752) on ImageNet: 395 M
# parameters, widths 192 times 1, 2, 3, 5, attention from the second level on. Here of diffusers' blocks: about 400 M
LDM_UNET = {
    "type": "UNet2DModel",
    "config": {
        "block_out_channels": [192, 384, 576, 960],
        "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 32,
    },
}
# Its autoencoder: factor 8, 84 M parameters, pictures of 256 pixels
LDM_AUTOENCODER = {
    "type": "AutoencoderKL",
    "config": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4},
}
TOY = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
BATCHES = {  # samples of a step, enough to fill a card of the H100's class
    "stage 2, LDM-class": 128,
    "stage 2, 64-pixel text model": 1024,
    "stage 2, weights/fashion-mnist": 1024,
    "stage 1, LDM-class": 16,
    "stage 1, 64 pixels": 256,
    "stage 1, weights/fashion-mnist": 512,
}
Step = Callable[[int], Any]


def config_of(name: str, clock: Any, folder: Path, **overrides: Any) -> Any:
    """The config of a part, its size a toy's in a dry run. overrides: of its train section."""
    from latentdiff.config import load_config, parse_config

    size = name.split(", ", 1)[1]
    emoji = "64" in size
    file = ("emoji/" if emoji else "fashion-mnist/") + ("autoencoder-kl.yaml" if "stage 1" in name else "diffusion.yaml")
    tree = load_config(ROOT / "configs" / file, [f"output={folder / 'run'}"]).model_dump(mode="json")
    ldm = size == "LDM-class"
    if "stage 1" in name:
        if ldm:
            tree["model"] |= LDM_AUTOENCODER
            tree["data"] |= {"size": [256, 256], "channels": 3}
            tree["loss"] |= {"perceptual": 0.0, "perceptual_network": None}
        if clock.dry:
            tree["model"]["config"] = {**TOY, "latent_channels": 2}
            tree["data"]["size"] = [16, 16]
        tree["loss"] |= {"perceptual": 0.0, "perceptual_network": None}
    else:
        if ldm:
            tree["model"] |= LDM_UNET
        if clock.dry:
            toy = tree["model"]["config"] | TOY | {"attention_head_dim": 4}
            toy |= {"down_block_types": toy["down_block_types"][:2], "up_block_types": toy["up_block_types"][-2:]}
            tree["model"]["config"] = toy
            if emoji:
                toy["addition_embed_type_num_heads"] = 4
                tree["condition"]["text"] |= {"width": 32, "layers": 1, "heads": 4, "vocabulary": 400}
    return parse_config(tree | {"train": tree["train"] | overrides})


def stage2(name: str, clock: Any, folder: Path, batch: int) -> tuple[Any, tuple[int, ...]]:
    """(the trainer on random latents and conditions, the latents' shape)."""
    from latentdiff.training import train_diffusion
    from latentdiff.training.accelerator import start_accelerator
    from latentdiff.training.latents import Latents
    from latentdiff.training.random_data import STAND_IN, RandomCache, random_conditions

    config = config_of(name, clock, folder, batch_size=batch, precision="bfloat16", threads=None)
    shape = SHAPES[next(key for key in SHAPES if key in name)]
    accelerator = start_accelerator(config.train)
    conditions = random_conditions(config, None, 10, shape)
    codec: Any = SimpleNamespace(normalise=lambda z: z)  # random latents are of unit variance already
    images: Any = None
    cache: Any = RandomCache(shape, STAND_IN)
    latents = Latents(codec, images, cache)
    return train_diffusion.DiffusionTrainer(config, latents, conditions, accelerator), shape


def our_step(trainer: Any) -> Step:
    return lambda number: trainer.train_step(number, 1e-4)


def plain_stage2(trainer: Any, shape: tuple[int, ...], batch: int) -> Step:
    """The loop of diffusers' examples at a copy of the same network, with what conditions it."""
    from diffusers import DDPMScheduler

    network, device = copy.deepcopy(trainer.model).train(), trainer.accelerator.device
    network.to(device)
    scheduler, finish = DDPMScheduler(), finisher(network, 0.999)
    generator = torch.Generator().manual_seed(0)
    draws = trainer.conditions.draw(batch, generator)
    conditioning = trainer.conditions(torch.zeros(batch, dtype=torch.int64), draws, device)
    source = torch.randn(4 * batch, *shape, device=device)

    def step(number: int) -> None:
        x0 = source[torch.randint(0, len(source), (batch,), device=device)]
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            output = network(scheduler.add_noise(x0, noise, t), t, **conditioning).sample
            loss = F.mse_loss(output.float(), noise)
        finish(loss)

    return step


def stage1(name: str, clock: Any, folder: Path, batch: int) -> tuple[Any, tuple[int, ...]]:
    """(the trainer, the pictures' shape)."""
    from latentdiff.models.codec import LatentCodec
    from latentdiff.training import train_autoencoder
    from latentdiff.training.accelerator import start_accelerator

    config = config_of(name, clock, folder, batch_size=batch, precision="bfloat16", threads=None)
    vae = train_autoencoder.make_autoencoder(config)
    factor = LatentCodec(vae).factor
    accelerator = start_accelerator(config.train)
    unit = math.lcm(factor, config.data.multiple_of)
    sides = [-(-side // unit) * unit for side in config.data.size]
    return train_autoencoder.AutoencoderTrainer(config, vae, None, accelerator), (config.data.channels, *sides)


def plain_stage1(trainer: Any, pictures: Tensor, batch: int) -> Step:
    vae, device = copy.deepcopy(trainer.model.vae).train(), trainer.accelerator.device
    finish = finisher(vae, 0.995)

    def step(number: int) -> None:
        x = pictures[torch.randint(0, len(pictures), (batch,), device=device)]
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        finish(F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().float().mean())

    return step


def seconds_a_step(step: Step, device: torch.device, slot: float) -> tuple[float, int]:
    """(seconds, steps measured): warmed up by three steps, then as many as the slot takes, in groups; the median group."""
    for number in range(3):
        step(number)
    wait(device)
    began, groups, number = time.perf_counter(), [], 3
    size = 1
    while time.perf_counter() - began < slot or not groups:
        start = time.perf_counter()
        for _ in range(size):
            step(number)
            number += 1
        wait(device)
        groups.append((time.perf_counter() - start) / size)
        size = max(1, min(10, int(slot / 8 / max(groups[-1], 1e-9))))
    return statistics.median(groups), number - 3


def operations(step: Step) -> float:
    """Floating-point operations of one step, attention taken apart into its products: fused ones are not counted everywhere."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(0)
    return float(counter.get_total_flops())


class Table:
    """Rows of one part, each beside latentdiff's own and beside the card's matrix rate."""

    def __init__(self, device: torch.device, clock: Any, results: Any, batch: int, rate: float):
        self.device, self.clock, self.results, self.batch, self.rate = device, clock, results, batch, rate
        self.work = 0.0
        self.first = 0.0

    def row(self, name: str, build: Callable[[], Step], slot: float, network: nn.Module | None = None) -> None:
        """Measure one contender; out of memory is a result like others."""
        if self.clock.left() < 2 * slot:
            self.results.add(name, note="no time left")
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            step = build()
            if not self.work:
                self.work = operations(step)
            seconds, count = seconds_a_step(step, self.device, self.clock.slot(slot))
        except torch.OutOfMemoryError as error:
            self.results.add(name, note=" ".join(str(error).split())[:120])
            return
        self.first = self.first or seconds
        memory = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else None
        extra = {} if network is None else {"M parameters": sum(p.numel() for p in network.parameters()) / 1e6}
        self.results.add(
            name,
            **{
                "img/s": self.batch / seconds,
                "milliseconds": 1e3 * seconds,
                "of the matrix rate": self.work / seconds / self.rate,
                "times latentdiff's": self.first / seconds,
                "GiB": memory,
                "steps": count,
                "GFLOP an image": self.work / self.batch / 1e9,
            },
            **extra,
        )


def not_fused(trainer: Any) -> None:
    groups = trainer.optimizer.param_groups
    for group in groups:
        group["fused"] = False
        group["foreach"] = True


def measure(name: str, device: torch.device, clock: Any, results: Any) -> None:
    """The part of this name: see PARTS of gpu.py."""
    compiled, size = name.startswith("compile, "), 256 if clock.dry else 8192
    name = name.replace("compile, ", "stage 2, ")
    batch = 4 if clock.dry else BATCHES[name]
    rate = matrix_rate(device, size, torch.bfloat16, 5)
    table = Table(device, clock, results, batch, rate)
    slot = max(1.0, min(5.0, clock.left() / 12))
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        if "stage 1" in name:
            measure_stage1(name, clock, folder, batch, table, slot)
        elif compiled:
            measure_compiled(name, device, clock, folder, batch, table, slot)
        else:
            measure_stage2(name, device, clock, folder, batch, table, slot)


def measure_stage2(name: str, device: torch.device, clock: Any, folder: Path, batch: int, table: Table, slot: float) -> None:
    trainer, shape = stage2(name, clock, folder, batch)
    step = our_step(trainer)
    table.row("latentdiff", lambda: step, slot, trainer.model)
    table.row("plain diffusers loop", lambda: plain_stage2(trainer, shape, batch), slot)
    not_fused(trainer)
    table.row("latentdiff, optimizer not fused", lambda: step, slot)
    for group in trainer.optimizer.param_groups:
        group["fused"], group["foreach"] = True, None
    trainer.model.to(memory_format=torch.channels_last)
    table.row("latentdiff, channels_last", lambda: step, slot)
    if device.type == "cuda":
        trainer.model.compile(backend="cudagraphs")
        table.row("latentdiff, channels_last, CUDA graphs", lambda: step, slot)


def measure_compiled(name: str, device: torch.device, clock: Any, folder: Path, batch: int, table: Table, slot: float) -> None:
    """torch.compile, held against eager by the trainer's own check; a refusal is a result."""
    from latentdiff.errors import UserError

    trainer, _ = stage2(name, clock, folder, batch)
    step = our_step(trainer)
    table.row("latentdiff", lambda: step, slot, trainer.model)
    began = time.perf_counter()
    try:
        trainer.compile()
    except UserError as error:
        table.results.add("latentdiff, train.compile", note=str(error)[:200])
        return
    table.results.add("compiling and checking it, seconds", seconds=time.perf_counter() - began)
    trainer.parallel_model.train()
    table.row("latentdiff, train.compile", lambda: step, slot)


def measure_stage1(name: str, clock: Any, folder: Path, batch: int, table: Table, slot: float) -> None:
    trainer, shape = stage1(name, clock, folder, batch)
    pictures = torch.rand(2 * batch, *shape, device=trainer.accelerator.device) * 2 - 1

    def step(number: int) -> None:
        trainer.update(pictures[:batch], number, 1e-4)

    table.row("latentdiff", lambda: step, slot, trainer.model)
    table.row("plain diffusers loop", lambda: plain_stage1(trainer, pictures, batch), slot)
    trainer.model.to(memory_format=torch.channels_last)
    table.row("latentdiff, channels_last", lambda: step, slot)
