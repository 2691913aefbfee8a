"""Stage 1: train an AutoencoderKL or a VQModel for reconstruction, then freeze it with its latents measured."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import AutoencoderConfig
from latentdiff.data.shuffling import stream
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import TRAINABLE, build_autoencoder, freeze, load_autoencoder, store_normaliser
from latentdiff.models.codebook import CodeUsage, revive_dead_codes
from latentdiff.models.codec import LatentCodec
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training import messages, state, trainer
from latentdiff.training.accelerator import announcement, start_accelerator, wait_for_everyone
from latentdiff.training.autoencoder_loss import Stage1Weights
from latentdiff.training.autoencoder_report import LatentStatistics
from latentdiff.training.autoencoder_step import Parts, Stage1, draw_noise, update
from latentdiff.training.compile import compile_checked
from latentdiff.training.ema import Ema
from latentdiff.training.images import Images, sweep
from latentdiff.training.logging import RunLogger
from latentdiff.training.loss_scale import LossScale
from latentdiff.training.micro_batch import find_micro_batch
from latentdiff.training.optimizer import make_optimizer
from latentdiff.training.precision import OneProcess, Step, check_state, named, resolve
from latentdiff.training.run_folder import locked_run_folder, write_config
from latentdiff.utils import atomic
from latentdiff.utils.hashes import write_hashes
from latentdiff.utils.random import derive_seed


def train_autoencoder(config: AutoencoderConfig, resume: bool = False) -> Path:
    """Train stage 1 as the config says; returns the folder of the finished autoencoder, <output>/autoencoder.

    Also written: run.json (the config), metrics.jsonl, logs/ (TensorBoard), pictures/, state/, report.json and report.png.
    """
    output = Path(config.output)
    accelerator = start_accelerator(config.train)
    with locked_run_folder(output, config, resume) as restores:
        _train(config, restores, accelerator, output)
    accelerator.end_training()
    return output / "autoencoder"


def _train(config: AutoencoderConfig, resume: bool, accelerator: Any, output: Path) -> None:
    torch.manual_seed(derive_seed(config.seed, "initialise"))
    vae = make_autoencoder(config)
    factor = LatentCodec(vae).factor
    images = Images(config.data, factor)
    to_train(config, vae)
    trial = partial(trial_steps, config, vae, (config.data.channels, *images.preprocess.padded_size))
    config, precision = resolve(config, output, accelerator, trial, resume)
    config = find_micro_batch(config, accelerator, trial)
    accelerator = start_accelerator(config.train)  # again: now at the precision that was chosen
    parts = make_parts(config, vae, factor, accelerator)
    if config.train.compile:
        _compile(config, images, parts, accelerator)
    work = _work(config, images, parts, accelerator, output)
    progress = trainer.resume(output, work, accelerator, config.train.keep) if resume else trainer.Progress()
    warnings = [*messages.length_warnings(config), *messages.data_warnings(config, len(images.train))]
    announcement(accelerator, config.train, precision, lines=messages.as_warnings(warnings))()
    images.say()
    if accelerator.is_main_process:
        write_config(output, config, resume)
        messages.print_lines([messages.where_results_appear(config)])
    with RunLogger(output, config.train.steps, progress.step, accelerator.is_main_process) as log:
        trainer.run_loop(config, work, accelerator, log, output, progress)
    parts.ema.copy_to(parts.bare.vae)
    publish(config, images, parts.bare.vae, accelerator, output / "autoencoder", {"steps": progress.step, **work.meta()})
    wait_for_everyone(accelerator)


def trial_steps(config: AutoencoderConfig, vae: nn.Module, shape: tuple[int, int, int], alone: OneProcess) -> Step:
    """Steps of a copy of the autoencoder on random images of this shape [C, H, W], as most of the run's steps are."""
    vae = copy.deepcopy(vae)
    factor = LatentCodec(vae).factor
    to_train(config, vae)
    parts = make_parts(config, vae, factor, alone)
    start, steps = config.loss.adversarial_start, config.train.steps
    number = start if config.loss.adversarial > 0 and 2 * start < steps else 0

    def step(precision: str, batch: int) -> None:
        alone.precision = precision
        x = torch.rand(batch, *shape, device=alone.device) * 2 - 1
        update(named(config, precision, batch), parts, alone, x, number, config.optimizer.lr)

    return step


def make_autoencoder(config: AutoencoderConfig) -> nn.Module:
    """The autoencoder that training starts from: a new one, or the one of model.pretrained. UserError where neither fits."""
    if config.model.pretrained is not None:
        vae = load_autoencoder(config.model.pretrained)
        if type(vae).__name__ not in TRAINABLE or vae.config.in_channels != config.data.channels:
            raise UserError(
                f"model.pretrained {config.model.pretrained}: is {type(vae).__name__} for {vae.config.in_channels} channels; "
                f"stage 1 trains {' or '.join(TRAINABLE)} with data.channels={config.data.channels}"
            )
        return vae
    if config.freeze_encoder:
        raise UserError("freeze_encoder: needs model.pretrained, an autoencoder whose encoder is trained")
    if config.model.type is None:
        raise UserError("model: set type (AutoencoderKL or VQModel) with config, or pretrained")
    return build_autoencoder(config.model.type, config.model.config, config.data.channels, config.initial_logvar)


def to_train(config: AutoencoderConfig, vae: nn.Module) -> None:
    """Have gradients reach what the config trains: everything, or all behind the latents."""
    vae.train().requires_grad_(True)
    if config.freeze_encoder:
        for name in ("encoder", "quant_conv", "quantize"):
            if getattr(vae, name, None) is not None:
                getattr(vae, name).requires_grad_(False)


def make_parts(config: AutoencoderConfig, vae: nn.Module, factor: int, accelerator) -> Parts:
    """All that a step uses: networks, optimizers, loss and EMA. factor: image side / latent side. UserError for a bad loss."""
    if config.train.compile and config.loss.adversarial > 0 and config.loss.adaptive:
        raise UserError("train.compile: a compiled decoder cannot weigh the adversary; set it or loss.adaptive to false")
    if not (config.loss.l1 or config.loss.l2 or config.loss.perceptual):
        raise UserError("loss: one of l1, l2 and perceptual must be above 0")
    bare = Stage1(vae)
    if bare.discrete and config.loss.commitment == 0:
        vae.quantize.requires_grad_(False)  # no term reaches the codebook, and DDP waits for every gradient
    if config.train.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    optimizer = make_optimizer(bare.parameters(), config.optimizer)
    loss = config.loss
    critic = critic_optimizer = perceptual = None
    if loss.adversarial > 0:
        widths = [loss.discriminator_channels * 2**i for i in range(loss.discriminator_layers + 1)]
        critic = PatchDiscriminator(config.data.channels, widths)
        own = {"lr": loss.discriminator_lr, "betas": (0.5, 0.9), "weight_decay": 0.0}  # as in 2012.09841; eps is shared
        critic_optimizer = make_optimizer(critic.parameters(), config.optimizer.model_copy(update=own))
    if loss.perceptual > 0:
        perceptual = _perceptual(loss.perceptual_network).to(accelerator.device)
    network, optimizer = accelerator.prepare(bare, optimizer)
    critic_network = None
    if critic is not None:
        critic_network, critic_optimizer = accelerator.prepare(critic, critic_optimizer)
    fields = ("l1", "l2", "perceptual", "kl", "commitment", "adversarial", "adversarial_start", "adaptive")
    return Parts(
        network,
        bare,
        optimizer,
        Ema(bare.vae, config.ema.decay, config.ema.power),
        Stage1Weights(**{name: getattr(loss, name) for name in fields}),
        perceptual,
        critic_network,
        critic,
        critic_optimizer,
        CodeUsage(vae.quantize.n_e) if bare.discrete else None,
        factor,
        LossScale(config.train.precision, accelerator.device),
    )


def _perceptual(network: str | None) -> nn.Module:
    from latentdiff.models.perceptual import Lpips, Perceptual

    if network is None:
        raise UserError("loss.perceptual_network: name a feature network's folder (or lpips), or set loss.perceptual=0")
    if network == "lpips":
        return Lpips()
    from latentdiff.checkpoints import resolve_model
    from latentdiff.models.feature_net import load_features

    return Perceptual(load_features(resolve_model(network)))


def _work(config: AutoencoderConfig, images: Images, parts: Parts, accelerator: Any, output: Path) -> trainer.Work:
    batch, reading = config.train.batch_size, _Reading(config, images, accelerator)
    per_epoch = max(1, len(images.train) // batch)

    def after(done: int) -> dict[str, float]:
        metrics = {}
        if parts.usage is not None and done % per_epoch == 0:
            metrics = _end_of_epoch(config, parts, accelerator, done - 1)
            parts.usage.reset()
        if done % config.train.picture_every == 0 and accelerator.is_main_process:
            picture(parts.bare.vae, images, output / "pictures" / f"step-{done:06d}.png")
        if done == config.train.steps:
            reading.close()
        return metrics

    def restore(tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        check_state(meta, config, output)
        _restore(output, parts, tensors, meta)

    return trainer.Work(
        step=lambda step, lr: update(config, parts, accelerator, reading.at(step), step, lr),
        after=after,
        tensors=lambda: _tensors(parts),
        meta=lambda: {"ema_updates": parts.ema.updates, "precision": config.train.precision},
        restore=restore,
        samples=lambda step: stream(len(images.train), config.seed, step * batch, batch, images.train.blocks),
        lowered=parts.scale.lowered,
        made_of={"data": images.train.fingerprint()},
    )


def _compile(config: AutoencoderConfig, images: Images, parts: Parts, accelerator: Any) -> None:
    """Compile encoder and decoder, held against eager on the first step's batch; UserError where they disagree."""
    reading = _Reading(config, images, accelerator)
    x = reading.at(0)
    reading.close()
    piece = trainer.shares(len(x), config.train.micro_batch)[0]
    noise, vae = draw_noise(config, parts, accelerator, x, 0), parts.bare.vae
    x, noise = x[piece], None if noise is None else noise[piece]

    def loss() -> Tensor:
        with accelerator.autocast():
            out = parts.bare(x, noise)
            extra = out["commitment"].float() if parts.bare.discrete else out["mean"].square().mean() + out["logvar"].mean()
            return (out["reconstruction"].float() - x).square().mean() + 1e-3 * extra

    compile_checked(parts.bare, [vae.encoder, vae.decoder], loss, config.train.precision)


class _Reading:
    """This process's images of each step, read ahead; from another step than the next one it starts anew."""

    def __init__(self, config: AutoencoderConfig, images: Images, accelerator: Any):
        self.config, self.images, self.accelerator = config, images, accelerator
        self.batches: Any = None

    def at(self, step: int) -> Tensor:
        batch = self.config.train.batch_size
        if self.batches is None or self.batches.position != step * batch:
            self.close()
            self.batches = self.images.batches(self.config.seed, batch, step, self.accelerator)
        return next(self.batches)[0].to(self.accelerator.device)

    def close(self) -> None:
        if self.batches is not None:
            self.batches.close()
            self.batches = None


def _end_of_epoch(config, parts: Parts, accelerator, step: int) -> dict[str, float]:
    """Revive the codes that the epoch left unused, say how much was used and revived."""
    usage = parts.usage
    values = {"codes/used": usage.usage(), "codes/perplexity": usage.perplexity(), "codes/revived": 0.0}
    if config.revive_dead_codes and not config.freeze_encoder and parts.latents is not None:
        # Every process draws the same codes from the same latents, so the codebooks stay equal
        shared = accelerator.gather(parts.latents.float().contiguous())
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "revive", step))
        values["codes/revived"] = float(revive_dead_codes(parts.bare.vae, usage.counts, shared, generator))
    return values


def _tensors(parts: Parts) -> dict[str, dict[str, Tensor]]:
    # Order of data and noise are functions of (seed, step), so the step is all there is to keep of them
    tensors = {"model": parts.bare.vae.state_dict(), "ema": parts.ema.state()}
    tensors["optimizer"] = state.optimizer_tensors(parts.optimizer)
    if parts.critic is not None:
        tensors["discriminator"] = parts.critic.state_dict()
        tensors["discriminator_optimizer"] = state.optimizer_tensors(parts.critic_optimizer)
    if parts.usage is not None:
        tensors["codes"] = {"counts": parts.usage.counts}
    if parts.scale.enabled:
        tensors["loss_scale"] = parts.scale.state()
    return tensors


def _restore(output: Path, parts: Parts, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    state.load_into(parts.bare.vae, tensors["model"], str(output))
    parts.ema.restore(tensors["ema"], meta["ema_updates"])
    state.restore_optimizer(parts.optimizer, tensors["optimizer"])
    if parts.critic is not None:
        state.load_into(parts.critic, tensors["discriminator"], str(output))
        state.restore_optimizer(parts.critic_optimizer, tensors.get("discriminator_optimizer", {}))
    if parts.usage is not None:
        parts.usage.counts.copy_(tensors["codes"]["counts"])
    parts.scale.restore(tensors.get("loss_scale", {}))


@torch.no_grad()
def picture(vae: nn.Module, images: Images, path: Path, count: int = 16) -> None:
    """Held-out images above their reconstructions, written while training."""
    from latentdiff.utils.images import save_rows

    training, learning = vae.training, [parameter.requires_grad for parameter in vae.parameters()]
    x, _ = images.held_out_batch(count)
    device = next(vae.parameters()).device
    codec = LatentCodec(vae)
    crop = images.preprocess.crop_content
    save_rows([crop(x), crop(codec.reconstruct(x.to(device)).cpu())], path)
    vae.train(training)
    for parameter, learns in zip(vae.parameters(), learning, strict=True):
        parameter.requires_grad_(learns)


def publish(
    config: AutoencoderConfig, images: Images, vae: nn.Module, accelerator: Any, folder: Path, meta: dict[str, Any]
) -> None:
    """Measure the latents of averaged weights over the training set, store the normaliser, save to `folder`, report beside it.

    Every process measures its share of the images; the main one writes. A frozen encoder keeps its normaliser. vae: holds
    the averaged weights, and is frozen. meta: what latentdiff.json says besides the config and the data.
    """
    from latentdiff.training.autoencoder_report import stage1_report, write_report

    freeze(vae)
    if not config.freeze_encoder:
        measured = _measure(config, images, LatentCodec(vae), accelerator)
        store_normaliser(vae, measured.mean.float(), measured.std.float())
    if not accelerator.is_main_process:
        return
    data = {"source": config.data.source, "images": len(images.train), "fingerprint": images.train.fingerprint()}
    record = {"config": config.model_dump(mode="json"), **meta, "data": data}
    with atomic.new_folder(folder) as new:
        vae.save_pretrained(new, safe_serialization=True)
        write_hashes(new)
        atomic.write_json(new / "latentdiff.json", record)
    codec = LatentCodec(load_autoencoder(str(folder)), refuse_non_finite=False)  # the report says it
    report, pairs = stage1_report(codec, sweep(images.held_out, config.train.batch_size), images.preprocess.content)
    if images.nothing_held_out:
        report["lines"].append("warn: measured on the training images, because each class has one image and none is held out")
    write_report(folder.parent, report, pairs)
    messages.save_report_lines(folder, report)
    messages.print_lines(messages.autoencoder_finished(folder, report["lines"]))


def publish_state(config: AutoencoderConfig, folder: Path, tensors: dict[str, Any], meta: dict[str, Any], output: Path) -> None:
    """Publish the averaged weights of a state or snapshot as the run would have published them had it ended there."""
    accelerator = start_accelerator(config.train)
    vae = make_autoencoder(config)
    images = Images(config.data, LatentCodec(vae).factor)
    trainer.check_made_of(output, meta.get("made_of"), {"data": images.train.fingerprint()})
    state.load_into(vae, tensors["ema"], str(output))
    vae.to(accelerator.device)
    publish(config, images, vae, accelerator, folder, {"steps": meta["step"], "ema_updates": meta["ema_updates"]})


def _measure(config: AutoencoderConfig, images: Images, codec: LatentCodec, accelerator: Any) -> LatentStatistics:
    """Mean and deviation of the raw latents of all training images, the same on every process."""
    own = LatentStatistics(codec.latent_channels)
    for x in sweep(images.train, config.train.batch_size, accelerator.process_index, accelerator.num_processes):
        own.update(*codec.moments(x))
    if accelerator.num_processes == 1:
        return own
    whole = LatentStatistics(codec.latent_channels)
    for state_of_one in accelerator.gather(own.state()[None].to(accelerator.device)).cpu():
        whole.merge(LatentStatistics.from_state(state_of_one))
    return whole
