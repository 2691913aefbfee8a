"""One update of stage 1: the autoencoder and its adversary, the same however the batch is shared out or cut up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import AutoencoderConfig
from latentdiff.models.codebook import CodeUsage
from latentdiff.training import trainer
from latentdiff.training.autoencoder_loss import Stage1Weights, discriminator_terms, likeness_and_adversarial, stage1_terms
from latentdiff.training.ema import Ema
from latentdiff.training.loss_scale import LossScale
from latentdiff.training.optimizer import clip_gradient, set_learning_rate
from latentdiff.utils.random import derive_seed, randn


class Stage1(nn.Module):
    """The whole reconstruction as one forward pass, so that a DDP wrapper averages the gradients of encoder and decoder."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.discrete = hasattr(vae, "quantize")
        if self.discrete:
            # |sg(z) - e|^2 + beta |z - sg(e)|^2, VQ-VAE (1711.00937) eq. 3, beta 0.25: diffusers' default, kept for old
            # weights' sake, has beta on the first term, which is the codebook's
            vae.quantize.legacy = False

    def forward(self, images: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """images [B, C, H, W] -> reconstruction, with mean and logvar (KL) or commitment, codes [n] and latents (VQ).

        noise [B, c, h, w]: what a KL posterior is drawn with; VQ takes none.
        """
        if self.discrete:
            latents = self.vae.encode(images).latents
            quantised, commitment, (_, _, codes) = self.vae.quantize(latents.float())
            image = self.vae.decode(quantised, force_not_quantize=True).sample
            return {"reconstruction": image, "commitment": commitment, "codes": codes.flatten(), "latents": latents}
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * noise
        return {"reconstruction": self.vae.decode(z).sample, "mean": mean, "logvar": logvar}


@dataclass
class Parts:
    """Everything a step touches. `network` and `critic_network` are what accelerate wrapped; the bare modules beside."""

    network: nn.Module
    bare: Stage1
    optimizer: Any
    ema: Ema
    weights: Stage1Weights
    perceptual: nn.Module | None
    critic_network: nn.Module | None
    critic: nn.Module | None
    critic_optimizer: Any
    usage: CodeUsage | None  # of a VQModel's codes in this epoch, over all processes
    factor: int  # image sides over latent sides
    scale: LossScale
    latents: Tensor | None = None  # of the last batch, for codes to be revived with


def draw_noise(config: AutoencoderConfig, parts: Parts, accelerator: Any, x: Tensor, step: int) -> Tensor | None:
    """What this process's posteriors are drawn with at a step: rows of noise drawn for the global batch."""
    if parts.bare.discrete:
        return None
    shape = (config.train.batch_size, parts.bare.vae.config.latent_channels, *(side // parts.factor for side in x.shape[2:]))
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "posterior", step))
    first = accelerator.process_index * len(x)
    return randn(shape, generator)[first : first + len(x)].to(x.device)


def update(
    config: AutoencoderConfig, parts: Parts, accelerator: Any, x: Tensor, step: int, lr: float
) -> tuple[dict[str, tuple[Tensor, int]], bool]:
    """One update of the autoencoder and, where it plays, of its adversary; none of either where a gradient is not finite."""
    set_learning_rate(parts.optimizer, lr)
    noise, count = draw_noise(config, parts, accelerator, x, step), len(x)
    pieces = [(x[rows], None if noise is None else noise[rows]) for rows in trainer.shares(count, config.train.micro_batch)]
    factor = _adaptive_factor(parts, accelerator, pieces, step) if len(pieces) > 1 else None
    values: dict[str, tuple[Tensor, int]] = {}
    reconstructions, outs = [], []
    for k, (images, drawn) in enumerate(pieces):
        with trainer.accumulating([parts.network], k + 1 == len(pieces)):
            out = parts.network(images, drawn)
            terms = _terms(parts, accelerator, images, out, step, factor)
            accelerator.backward(parts.scale.scaled(terms["total"] * (len(images) / count)))
        reconstructions.append(out["reconstruction"].detach().float())
        outs.append({name: out[name].detach() for name in ("codes", "latents") if name in out})
        _count_in(values, terms, len(images))
    parts.scale.unscale(parts.optimizer)
    norm = clip_gradient(parts.bare, config.optimizer.clip)
    values |= parts.scale.logged()
    values["gradient_norm"] = (torch.tensor(norm), 1)
    optimizers, good = [parts.optimizer], math.isfinite(norm)
    if good and parts.critic is not None and parts.weights.adversarial_at(step):
        # Its gradient, on reconstructions made before either side moves, is known before either does
        optimizers.append(parts.critic_optimizer)
        good = math.isfinite(_critic_gradient(config, parts, accelerator, x, reconstructions, values))
    for optimizer in optimizers:
        if good:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if good:
        parts.scale.stepped()
        parts.ema.update(parts.bare.vae)
    if good and parts.usage is not None:
        parts.usage.update(accelerator.gather(torch.cat([out["codes"] for out in outs])))
        parts.latents = torch.cat([out["latents"] for out in outs])
    return values, good


def _terms(parts: Parts, accelerator: Any, images: Tensor, out: dict[str, Tensor], step: int, factor: Any) -> dict[str, Tensor]:
    def across_processes(value: Tensor) -> Tensor:
        return accelerator.reduce(value, "mean")

    with accelerator.autocast():
        return stage1_terms(
            images,
            out["reconstruction"].float(),
            parts.weights,
            step,
            moments=None if parts.bare.discrete else (out["mean"], out["logvar"]),
            commitment=out.get("commitment"),
            perceptual=parts.perceptual,
            discriminator=parts.critic,
            last_layer=parts.bare.vae.decoder.conv_out.weight,
            reduce=across_processes if accelerator.num_processes > 1 else None,
            factor=factor,
            scale=parts.scale.factor(),
        )


def _adaptive_factor(parts: Parts, accelerator: Any, pieces: list[tuple[Tensor, Tensor | None]], step: int) -> Tensor | None:
    """The adversarial term's weight over a batch in pieces: gradients of the whole batch at the last layer, compared.

    It has to be known before the first backward pass, so the pieces go through the network once more.
    """
    weights, last = parts.weights, parts.bare.vae.decoder.conv_out.weight
    if parts.critic is None or not weights.adversarial_at(step) or not weights.adaptive:
        return None
    total = sum(len(images) for images, _ in pieces)
    sums = [torch.zeros_like(last), torch.zeros_like(last)]
    with trainer.accumulating([parts.network], last=False):
        for images, drawn in pieces:
            reconstruction = parts.network(images, drawn)["reconstruction"].float()
            with accelerator.autocast():
                both = likeness_and_adversarial(images, reconstruction, weights, parts.critic, parts.perceptual)
            scale = parts.scale.factor()
            for k, loss in enumerate(both):
                (gradient,) = torch.autograd.grad(loss * scale, last, retain_graph=k == 0)
                sums[k] += gradient * (len(images) / total / scale)
    likeness, adversarial = (accelerator.reduce(value, "mean").norm() for value in sums)
    return (likeness / (adversarial + 1e-6)).clamp(0.0, weights.adaptive_max)


def _critic_gradient(
    config: AutoencoderConfig, parts: Parts, accelerator: Any, x: Tensor, reconstructions: list[Tensor], values: dict[str, Any]
) -> float:
    """The norm of the adversary's gradient on the same images, before and after; the gradient is left clipped."""
    assert parts.critic is not None and parts.critic_network is not None
    first, count = 0, len(x)
    for k, fake in enumerate(reconstructions):
        real, first = x[first : first + len(fake)], first + len(fake)
        with trainer.accumulating([parts.critic_network], k + 1 == len(reconstructions)):
            with accelerator.autocast():
                terms = discriminator_terms(parts.critic_network, real, fake)
            accelerator.backward(parts.scale.scaled(terms["total"] * (len(real) / count)))
        _count_in(values, {f"discriminator_{name}": value for name, value in terms.items()}, len(real))
    parts.scale.unscale(parts.critic_optimizer)
    return clip_gradient(parts.critic, config.optimizer.clip)


def _count_in(values: dict[str, tuple[Tensor, int]], terms: dict[str, Tensor], count: int) -> None:
    """Add one piece's means to those of the batch so far, weighed by their samples."""
    for name, term in terms.items():
        mean, before = values.get(name, (torch.zeros_like(term.detach()), 0))
        values[name] = ((mean * before + term.detach() * count) / (before + count), before + count)
