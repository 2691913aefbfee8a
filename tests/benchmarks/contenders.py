"""What speed.py times: latentdiff's own training steps, and the plain loops of diffusers' examples at the same networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
CONFIGS, WEIGHTS = ROOT / "configs" / "fashion-mnist", ROOT / "weights" / "fashion-mnist"
PICTURES, CLASSES, SIDE = 2048, 10, 28


@dataclass
class Contender:
    """step(number) trains once; network: what it trains."""

    step: Callable[[int], Any]
    network: nn.Module


@dataclass
class Setting:
    """What all contenders share.  folder: of pictures and latents, made by `prepare`.  batch: of stage 2, twice stage 1's."""

    folder: Path
    batch: int
    device: torch.device

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def prepare(self) -> None:
        """Write grey pictures of noise in class folders, and encode them with the first stage of weights/fashion-mnist."""
        draws = np.random.default_rng(0)
        for k in range(PICTURES):
            place = self.folder / "pictures" / f"class-{k % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draws.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(place / f"{k:05d}.png")
        self.ours()

    def ours(self) -> tuple[Any, Any, Any]:
        """(config, latents, accelerator) of latentdiff's stage 2."""
        from latentdiff.config import load_config
        from latentdiff.training.accelerator import start_accelerator
        from latentdiff.training.latents import prepare_latents

        settings = [
            f"data.source={self.folder / 'pictures'}",
            f"autoencoder={WEIGHTS / 'vae'}",
            "normaliser=measured",
            f"output={self.folder / 'stage2'}",
            f"cache.folder={self.folder / 'latents'}",
            f"train.batch_size={self.batch}",
            "train.precision=bfloat16",
            "sample.guidance_interval=null",
        ]
        config = load_config(CONFIGS / "diffusion.yaml", settings)
        accelerator = start_accelerator(config.train)
        return config, prepare_latents(config, accelerator), accelerator

    def latents(self) -> tuple[Tensor, Tensor]:
        """Normalised latents [N, 8, 8, 8] and labels [N], in memory."""
        from latentdiff.data.latent_cache import open_cache

        cache = open_cache(self.folder / "latents")
        mean, _ = cache.moments(torch.arange(len(cache)))
        across = (0, 2, 3)
        normalised = (mean - mean.mean(across, keepdim=True)) / mean.std(across, keepdim=True)
        assert cache.labels is not None
        return normalised.contiguous().to(self.device), cache.labels.to(self.device)

    def pictures(self) -> Tensor:
        """[N, 1, 32, 32] in [-1, 1], in memory."""
        return torch.rand(PICTURES, 1, 32, 32, device=self.device) * 2 - 1


def finisher(network: nn.Module, decay: float) -> Callable[[Tensor], None]:
    """The rest of a plain step as diffusers' training examples have it: AdamW, clipping, an average of the weights."""
    from diffusers.training_utils import EMAModel

    optimizer, ema = torch.optim.AdamW(network.parameters(), lr=1e-4), EMAModel(network.parameters(), decay=decay)

    def finish(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())

    return finish


def our_stage2(setting: Setting) -> Contender:
    """The trainer's own step on cached latents."""
    from latentdiff.training import conditioning, train_diffusion

    config, latents, accelerator = setting.ours()
    conditions = conditioning.prepare_conditions(config, latents, accelerator)
    trainer = train_diffusion.DiffusionTrainer(config, latents, conditions, accelerator)
    return Contender(lambda number: trainer.train_step(number, 1e-4), trainer.model)


def plain_stage2(setting: Setting, encode: bool = False) -> Contender:
    """diffusers' loop over latents in memory, or over pictures that it encodes."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel

    unet = UNet2DModel.from_config(UNet2DModel.load_config(WEIGHTS / "unet")).train().to(setting.device)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32) if encode else None
    vae = vae.eval().requires_grad_(False).to(setting.device) if vae is not None else None
    latents, labels = setting.latents()
    source = latents if vae is None else setting.pictures()
    scheduler, finish, batch = DDPMScheduler(), finisher(unet, 0.998), setting.batch

    def step(number: int) -> None:
        rows = torch.randint(0, len(latents), (batch,), device=setting.device)
        x0 = source[rows]
        if vae is not None:
            with torch.no_grad(), setting.autocast():
                x0 = vae.encode(x0).latent_dist.sample().float()
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (batch,), device=setting.device)
        with setting.autocast():
            output = unet(scheduler.add_noise(x0, noise, t), t, class_labels=labels[rows]).sample
            loss = F.mse_loss(output.float(), noise)
        finish(loss)

    return Contender(step, unet)


def our_stage1(setting: Setting) -> Contender:
    from latentdiff.config import load_config
    from latentdiff.training import train_autoencoder
    from latentdiff.training.accelerator import start_accelerator
    from latentdiff.training.images import Images

    settings = [
        f"data.source={setting.folder / 'pictures'}",
        f"output={setting.folder / 'stage1'}",
        f"train.batch_size={setting.batch // 2}",
        "train.precision=bfloat16",
        "loss.perceptual=0",
    ]
    config = load_config(CONFIGS / "autoencoder-kl.yaml", settings)
    vae = train_autoencoder.make_autoencoder(config)
    accelerator = start_accelerator(config.train)
    trainer = train_autoencoder.AutoencoderTrainer(config, vae, Images(config.data, 4), accelerator)
    return Contender(lambda number: trainer.train_step(number, 1e-4), trainer.model)


def plain_stage1(setting: Setting) -> Contender:
    """A plain AutoencoderKL loop on pictures in memory: encode, sample, decode, pixel losses and KL."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(WEIGHTS / "vae")).train().to(setting.device)
    pictures, finish = setting.pictures(), finisher(vae, 0.995)

    def step(number: int) -> None:
        x = pictures[torch.randint(0, len(pictures), (setting.batch // 2,), device=setting.device)]
        with setting.autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample.float()
        finish(F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().float().mean())

    return Contender(step, vae)
