"""Training steps of other projects' models, for speed.py: each raises ImportError where its project is not installed."""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType

import torch
from contenders import Contender, Setting, finisher
from torch import nn
from torch.nn import functional as F


def monai_autoencoder() -> nn.Module:
    """MONAI's AutoencoderKL nearest to the first stage of weights/fashion-mnist: its widths and its latents.

    It has one number of blocks for both halves (diffusers' decoder has one more a level), and its middle comes with attention
    or not at all: 2.32 M parameters against 2.58 M.
    """
    from monai.networks.nets import AutoencoderKL

    return AutoencoderKL(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(32, 64, 128),
        num_res_blocks=(1, 1, 1),
        attention_levels=(False, False, False),
        latent_channels=8,
        norm_num_groups=16,
    )


def monai_stage2(setting: Setting, encode: bool = False) -> Contender:
    """MONAI's U-Net of as many parameters, trained by its inferers: on latents in memory, or encoding each batch."""
    from monai.inferers import DiffusionInferer, LatentDiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDPMScheduler

    # attention is left at MONAI's default, matrix products: over 64 positions faster than torch's kernel on a CPU
    unet = (
        DiffusionModelUNet(
            spatial_dims=2,
            in_channels=8,
            out_channels=8,
            channels=(128, 256),
            attention_levels=(False, True),
            num_res_blocks=2,
            num_head_channels=(0, 64),
            norm_num_groups=32,
            num_class_embeds=11,
        )
        .train()
        .to(setting.device)
    )
    latents, labels = setting.latents()
    finish, batch, scheduler = finisher(unet, 0.998), setting.batch, DDPMScheduler(num_train_timesteps=1000)
    if encode:
        vae = monai_autoencoder().eval().requires_grad_(False).to(setting.device)
        source, forward = setting.pictures(), partial(LatentDiffusionInferer(scheduler), autoencoder_model=vae)
    else:
        source, forward = latents, DiffusionInferer(scheduler)

    def step(number: int) -> None:
        rows = torch.randint(0, len(latents), (batch,), device=setting.device)
        noise, t = torch.randn_like(latents[rows]), torch.randint(0, 1000, (batch,), device=setting.device)
        # the inferers hand no class on, so that it comes with the network
        told = partial(unet, class_labels=labels[rows])
        with setting.autocast():
            output = forward(inputs=source[rows], diffusion_model=told, noise=noise, timesteps=t)
            loss = F.mse_loss(output.float(), noise)
        finish(loss)

    return Contender(step, unet)


def monai_stage1(setting: Setting) -> Contender:
    """MONAI's AutoencoderKL with the losses of the plain loop, on pictures in memory."""
    vae = monai_autoencoder().train().to(setting.device)
    pictures, finish = setting.pictures(), finisher(vae, 0.995)

    def step(number: int) -> None:
        x = pictures[torch.randint(0, len(pictures), (setting.batch // 2,), device=setting.device)]
        with setting.autocast():
            y, mean, std = vae(x)
        y, mean, std = y.float(), mean.float(), std.float()
        kl = 0.5 * (mean.square() + std.square() - std.square().log() - 1).sum((1, 2, 3)).mean()
        finish(F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * kl)

    return Contender(step, vae)


def lucidrains_stage2(setting: Setting) -> Contender:
    """denoising-diffusion-pytorch's U-Net and loss, of about as many parameters (15.3 M): on pixels, and without classes."""
    diffusion, unet_class = _lucidrains()
    unet = unet_class(80, dim_mults=(1, 2, 4), channels=1)
    model = diffusion(unet, image_size=32, objective="pred_noise").train().to(setting.device)
    pictures, finish = setting.pictures() / 2 + 0.5, finisher(unet, 0.998)

    def step(number: int) -> None:
        rows = torch.randint(0, len(pictures), (setting.batch,), device=setting.device)
        with setting.autocast():
            loss = model(pictures[rows])
        finish(loss)

    return Contender(step, unet)


def _lucidrains() -> tuple[type, type]:
    """Its (GaussianDiffusion, Unet).

    The file that has them imports torchvision at its top, for the data set and the pictures of a trainer that is not used
    here. Where torchvision is not installed (its builds are tied to one build of torch), empty modules stand in for it while
    that file is read, and are gone before another library looks whether it is there.
    """
    names = ("torchvision", "torchvision.transforms", "torchvision.utils")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        stand_ins = {name: ModuleType(name) for name in names}
        stand_ins["torchvision"].transforms = stand_ins["torchvision.transforms"]  # type: ignore[attr-defined]
        stand_ins["torchvision"].utils = stand_ins["torchvision.utils"]  # type: ignore[attr-defined]
        import accelerate  # noqa: F401  (it looks for torchvision too, and is imported by that file)

        sys.modules.update(stand_ins)
    else:
        stand_ins = {}
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return GaussianDiffusion, Unet
