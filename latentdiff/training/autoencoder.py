"""Stage 1: train an AutoencoderKL or a VQModel for reconstruction, then freeze it with its latents measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.autoencoders.build import TRAINABLE, build_autoencoder, freeze, load_autoencoder, store_normaliser
from latentdiff.autoencoders.codec import LatentCodec
from latentdiff.autoencoders.discriminator import PatchDiscriminator
from latentdiff.autoencoders.losses import Stage1Weights, discriminator_terms, stage1_terms
from latentdiff.autoencoders.vq import CodeUsage, revive_dead_codes
from latentdiff.config import AutoencoderConfig
from latentdiff.errors import UserError
from latentdiff.rng import derive_seed
from latentdiff.training import run, state
from latentdiff.training.data import Images, sweep
from latentdiff.training.ema import Ema


class Stage1(nn.Module):
    """The whole reconstruction as one forward pass, so that a DDP wrapper averages the gradients of encoder and decoder."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        self.discrete = hasattr(vae, "quantize")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images [B, C, H, W] -> reconstruction, with mean and logvar (KL) or commitment, codes [n] and latents (VQ)."""
        if self.discrete:
            latents = self.vae.encode(images).latents
            quantised, commitment, (_, _, codes) = self.vae.quantize(latents.float())
            image = self.vae.decode(quantised, force_not_quantize=True).sample
            return {"reconstruction": image, "commitment": commitment, "codes": codes.flatten(), "latents": latents}
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
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


def train_autoencoder(config: AutoencoderConfig, resume: bool = False) -> Path:
    """Train stage 1 as the config says; returns the folder of the finished autoencoder, <output>/autoencoder.

    Also written: run.json (the config), metrics.jsonl, logs/ (TensorBoard), pictures/, state/, report.json and report.png.
    """
    output = Path(config.output)
    run.check_output(output, config, resume)
    torch.manual_seed(derive_seed(config.seed, "initialise"))
    vae = _build(config)
    images = Images(config.data, LatentCodec(vae).factor)
    vae.train().requires_grad_(True)
    accelerator = run.start_accelerator(config.train)
    parts = _parts(config, vae, accelerator)
    start = _resume(output, parts) if resume else 0
    run.announcement(accelerator, config.train)()
    if accelerator.is_main_process:
        run.write_config(output, config)
    with run.Journal(output, config.train.steps, start, accelerator.is_main_process) as journal:
        _loop(config, images, parts, accelerator, journal, output, start)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(config, images, parts, output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "autoencoder"


def _build(config: AutoencoderConfig) -> nn.Module:
    if config.model.pretrained is not None:
        vae = load_autoencoder(config.model.pretrained)
        if type(vae).__name__ not in TRAINABLE or vae.config.in_channels != config.data.channels:
            raise UserError(
                f"model.pretrained {config.model.pretrained}: is {type(vae).__name__} for {vae.config.in_channels} channels; "
                f"stage 1 trains {' or '.join(TRAINABLE)} with data.channels={config.data.channels}"
            )
        return vae
    if config.model.type is None:
        raise UserError("model: set type (AutoencoderKL or VQModel) with config, or pretrained")
    return build_autoencoder(config.model.type, config.model.config, config.data.channels, config.initial_logvar)


def _parts(config: AutoencoderConfig, vae: nn.Module, accelerator) -> Parts:
    if not (config.loss.l1 or config.loss.l2 or config.loss.perceptual):
        raise UserError("loss: one of l1, l2 and perceptual must be above 0")
    bare = Stage1(vae)
    optimizer = run.make_optimizer(bare.parameters(), config.optimizer)
    loss = config.loss
    critic = critic_optimizer = perceptual = None
    if loss.adversarial > 0:
        widths = [loss.discriminator_channels * 2**i for i in range(loss.discriminator_layers + 1)]
        critic = PatchDiscriminator(config.data.channels, widths)
        critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=loss.discriminator_lr, betas=(0.5, 0.9), weight_decay=0)
    if loss.perceptual > 0:
        perceptual = _perceptual(loss.perceptual_network).to(accelerator.device)
    network, optimizer = accelerator.prepare(bare, optimizer)
    critic_network = None
    if critic is not None:
        critic_network, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
    fields = ("l1", "l2", "perceptual", "kl", "commitment", "adversarial", "adversarial_start", "adaptive")
    return Parts(
        network, bare, optimizer, Ema(bare.vae, config.ema.decay, config.ema.power),
        Stage1Weights(**{name: getattr(loss, name) for name in fields}),
        perceptual, critic_network, critic, critic_optimizer, CodeUsage(vae.quantize.n_e) if bare.discrete else None,
    )  # fmt: skip


def _perceptual(network: str | None) -> nn.Module:
    from latentdiff.autoencoders.perceptual import Lpips, Perceptual

    if network is None:
        raise UserError("loss.perceptual_network: name a feature network's folder (or lpips), or set loss.perceptual=0")
    if network == "lpips":
        return Lpips()
    from latentdiff.checkpoints import resolve_model
    from latentdiff.evaluation.features import load_features

    return Perceptual(load_features(resolve_model(network)))


def _loop(
    config: AutoencoderConfig, images: Images, parts: Parts, accelerator, journal: run.Journal, output: Path, start: int
) -> None:
    steps, batch = config.train.steps, config.train.batch_size
    batches = images.batches(config.seed, batch, start, accelerator)
    clock, averages = run.SaveClock(config.train.save_minutes), run.Averages()
    per_epoch = max(1, len(images.train) // batch)
    for step in range(start, steps):
        x, _ = next(batches)
        torch.manual_seed(derive_seed(config.seed, "step", step, accelerator.process_index))
        run.set_learning_rate(parts.optimizer, run.learning_rate(config.optimizer, step, steps))
        terms, out = _step(config, parts, accelerator, x.to(accelerator.device), step)
        averages.add(terms)
        if parts.usage is not None:
            parts.usage.update(accelerator.gather(out["codes"]))
            if (step + 1) % per_epoch == 0:
                journal.log(step + 1, _end_of_epoch(config, parts, accelerator, out["latents"], step))
                parts.usage.reset()
        journal.advance()
        if (step + 1) % config.train.log_every == 0 or step + 1 == steps:
            lr = run.learning_rate(config.optimizer, step, steps)
            journal.log(step + 1, {f"train/{k}": v for k, v in averages.take().items()} | {"lr": lr})
        if accelerator.is_main_process:
            if (step + 1) % config.train.picture_every == 0:
                picture(parts.bare.vae, images, output / "pictures" / f"step-{step + 1:06d}.png")
            if clock.due() or step + 1 == steps:
                _save(config, parts, output, step + 1)
    batches.close()


def _step(config, parts: Parts, accelerator, x: Tensor, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    out = parts.network(x)
    reconstruction = out["reconstruction"].float()
    moments = None if parts.bare.discrete else (out["mean"], out["logvar"])

    def across_processes(value: Tensor) -> Tensor:
        return accelerator.reduce(value, "mean")

    with accelerator.autocast():
        terms = stage1_terms(
            x, reconstruction, parts.weights, step, moments=moments, commitment=out.get("commitment"),
            perceptual=parts.perceptual, discriminator=parts.critic, last_layer=parts.bare.vae.decoder.conv_out.weight,
            reduce=across_processes if accelerator.num_processes > 1 else None,
        )  # fmt: skip
    accelerator.backward(terms["total"])
    norm = run.gradient_norm(parts.bare, config.optimizer.clip)
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    parts.ema.update(parts.bare.vae)
    terms["gradient_norm"] = torch.tensor(norm)
    if parts.critic is not None and parts.weights.adversarial_at(step):
        with accelerator.autocast():
            critic = discriminator_terms(parts.critic_network, x, reconstruction)
        accelerator.backward(critic["total"])
        run.gradient_norm(parts.critic, config.optimizer.clip)
        parts.critic_optimizer.step()
        parts.critic_optimizer.zero_grad(set_to_none=True)
        terms |= {f"discriminator_{name}": value for name, value in critic.items()}
    return terms, out


def _end_of_epoch(config, parts: Parts, accelerator, latents: Tensor, step: int) -> dict[str, float]:
    """Revive the codes that the epoch left unused, say how much was used and revived."""
    usage = parts.usage
    values = {"codes/used": usage.usage(), "codes/perplexity": usage.perplexity(), "codes/revived": 0.0}
    if config.revive_dead_codes:
        # Every process draws the same codes from the same latents, so the codebooks stay equal
        shared = accelerator.gather(latents.detach().float().contiguous())
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "revive", step))
        values["codes/revived"] = float(revive_dead_codes(parts.bare.vae, usage.counts, shared, generator))
    return values


def _save(config: AutoencoderConfig, parts: Parts, output: Path, step: int) -> None:
    tensors = {"model": parts.bare.vae.state_dict(), "ema": parts.ema.state()}
    tensors["optimizer"] = state.optimizer_tensors(parts.optimizer)
    if parts.critic is not None:
        tensors["discriminator"] = parts.critic.state_dict()
        tensors["discriminator_optimizer"] = state.optimizer_tensors(parts.critic_optimizer)
    if parts.usage is not None:
        tensors["codes"] = {"counts": parts.usage.counts}
    # Order of data and noise are functions of (seed, step), so the step is all there is to keep of them
    state.save_state(output, step, tensors, {"ema_updates": parts.ema.updates}, config.train.keep)


def _resume(output: Path, parts: Parts) -> int:
    tensors, meta = state.load_state(output)
    state.load_into(parts.bare.vae, tensors["model"], str(output))
    parts.ema.restore(tensors["ema"], meta["ema_updates"])
    state.restore_optimizer(parts.optimizer, tensors["optimizer"])
    if parts.critic is not None:
        state.load_into(parts.critic, tensors["discriminator"], str(output))
        state.restore_optimizer(parts.critic_optimizer, tensors.get("discriminator_optimizer", {}))
    if parts.usage is not None:
        parts.usage.counts.copy_(tensors["codes"]["counts"])
    return meta["step"]


@torch.no_grad()
def picture(vae: nn.Module, images: Images, path: Path, count: int = 16) -> None:
    """Held-out images above their reconstructions, written while training."""
    from latentdiff.pictures import save_rows

    training = vae.training
    x, _ = images.held_out_batch(count)
    device = next(vae.parameters()).device
    codec = LatentCodec(vae)
    crop = images.preprocess.crop_content
    save_rows([crop(x), crop(codec.reconstruct(x.to(device)).cpu())], path)
    vae.train(training).requires_grad_(training)


def _finish(config: AutoencoderConfig, images: Images, parts: Parts, output: Path) -> None:
    """Measure the latents of the averaged weights over the training set, store the normaliser, save, report."""
    from latentdiff.autoencoders.report import LatentStatistics, stage1_report, write_report

    vae = parts.bare.vae
    parts.ema.copy_to(vae)
    codec = LatentCodec(freeze(vae))
    statistics = LatentStatistics(codec.latent_channels)
    for x in sweep(images.train, config.train.batch_size):
        statistics.update(*codec.moments(x))
    store_normaliser(vae, statistics.mean.float(), statistics.std.float())
    vae.save_pretrained(output / "autoencoder", safe_serialization=True)
    codec = LatentCodec(load_autoencoder(str(output / "autoencoder")))
    report, pairs = stage1_report(codec, sweep(images.held_out, config.train.batch_size), images.preprocess.content)
    write_report(output, report, pairs)
