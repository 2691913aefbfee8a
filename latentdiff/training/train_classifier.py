"""Training of a classifier of noisy latents, for classifier guidance of a diffusion model on the same latents."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import ClassifierConfig
from latentdiff.data.shuffling import coin_flips, stream
from latentdiff.errors import UserError
from latentdiff.guidance import LatentClassifier
from latentdiff.models.codec import LatentCodec
from latentdiff.noise_levels import NoiseLevels, make_noise_levels
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.training.accelerator import announcement, start_accelerator
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents, open_inputs, prepare_latents, progress_bar
from latentdiff.training.logging import Averages, RunLogger
from latentdiff.training.optimizer import clip_gradient, learning_rate, make_optimizer, set_learning_rate
from latentdiff.training.precision import OneProcess, Step, plain_steps, resolve
from latentdiff.training.run_folder import write_config
from latentdiff.utils.random import derive_seed, randn
from latentdiff.utils.tensors import widen

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # places in the usable time interval at which the accuracy is measured


def train_latent_classifier(config: ClassifierConfig, resume: bool = False) -> Path:
    """Train the classifier that a config describes, write it to <output>/classifier and return that folder.

    Also written: run.json, metrics.jsonl, logs/ (TensorBoard), and the latent cache where the config puts it. UserError for
    a mistake in the config or the data, for a classifier that is there already, and for `resume`: it has no states.
    """
    output = Path(config.output)
    if resume or (output / "classifier").exists():
        raise UserError(f"output {output}: a classifier trains in one go; leave --resume out and name a new folder")
    for key in config.model:
        if key != "widths":
            raise UserError(f"model.{key}: unknown key; a classifier has only widths, two numbers")
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    levels = make_noise_levels(config.noise_levels.name, schedule, **config.noise_levels.params)
    accelerator = start_accelerator(config.train)
    if accelerator.num_processes > 1:
        raise UserError("stage: classifier trains in one process; start it without accelerate launch")
    named_schedule = {"name": config.schedule.name, **config.schedule.params}
    try:
        LatentClassifier(1, 2, named_schedule, **config.model)  # so that it is refused before anything is encoded
    except TypeError as error:
        raise UserError(f"model: a classifier has only widths, a list of two numbers ({error})") from None
    codec, images = open_inputs(config, accelerator.device)
    if images.train.labels is None:
        why = images.train.source.unlabelled or "has no classes to tell apart; add class folders"
        raise UserError(f"data.source {config.data.source}: {why}")
    config, precision = resolve(config, output, accelerator, partial(_trial_steps, config, codec, images))
    accelerator = start_accelerator(config.train)  # again: now at the precision that was chosen
    announce = announcement(accelerator, config.train, precision)
    with progress_bar("encoding", True, announce) as progress:
        latents = prepare_latents(config, accelerator, progress, (codec, images))
    assert latents.cache.labels is not None  # the images have them
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "initialise"))
        classes = len(latents.images.class_names)
        net = LatentClassifier(latents.cache.latent_shape[0], classes, named_schedule, **config.model).to(accelerator.device)
    announce()
    latents.images.print_report()
    write_config(output, config)
    _fit(config, net, latents, latents.cache.labels, levels, accelerator, output)
    net.info = _info(config, net.eval(), latents, accelerator.device)
    net.save(output / "classifier")
    scores = net.info["held_out"]
    by_level = ", ".join(f"{a:.3f} at t {t:.2f}" for t, a in zip(scores["t"], scores["accuracy"], strict=True))
    print(f"classifier: accuracy on {scores['images']} held-out images: {by_level}", file=sys.stderr)
    return output / "classifier"


def _trial_steps(config: ClassifierConfig, codec: LatentCodec, images: Images, alone: OneProcess) -> Step:
    """Training steps of such a classifier on random latents, to be timed."""
    shape, classes = codec.latent_shape(*images.preprocess.padded_size), len(images.class_names)
    net = LatentClassifier(shape[0], classes, {"name": config.schedule.name, **config.schedule.params}, **config.model)
    low, high = net.schedule.t_min, net.schedule.t_max

    def loss(module: nn.Module, batch: int) -> Tensor:
        t = low + (high - low) * torch.rand(batch, dtype=torch.float64, device=alone.device)
        labels = torch.randint(classes, (batch,), device=alone.device)
        return -module(torch.randn(batch, *shape, device=alone.device), t, labels).mean()

    return plain_steps(alone, net, loss)


def _fit(
    config: ClassifierConfig,
    net: LatentClassifier,
    latents: Latents,
    classes: Tensor,
    levels: NoiseLevels,
    accelerator: Any,
    output: Path,
) -> None:
    """Train the network. Images, noise and t of a step follow from the seed and its number. classes: int64 [N]."""
    steps = config.train.steps
    optimizer, averages = make_optimizer(net.parameters(), config.optimizer), Averages()
    net.train()
    with RunLogger(output, steps, 0, accelerator, config.train.trackers) as log:
        for step in range(steps):
            lr = learning_rate(config.optimizer, step, steps)
            set_learning_rate(optimizer, lr)
            x0, indices, generator = _batch(config, latents, step)
            noise, t = randn(x0.shape, generator), levels.sample(len(x0), generator)
            x = _noised(net.schedule, x0, noise, t)
            x, t, labels = (part.to(accelerator.device) for part in (x, t, classes[indices]))
            with accelerator.autocast():
                loss = -net(x, t, labels).mean()  # the cross-entropy in nats
            loss.backward()
            norm = clip_gradient(net, config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            averages.add({"loss": loss, "gradient_norm": torch.tensor(norm)})
            log.advance()
            if (step + 1) % config.train.log_every == 0 or step + 1 == steps:
                log.metrics(step + 1, {f"train/{k}": v for k, v in averages.take(accelerator).items()} | {"lr": lr})


def _batch(config: ClassifierConfig, latents: Latents, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """(normalised latents [B, c, h, w] of a step, their indices [B], the step's generator), on the CPU."""
    batch = config.train.batch_size
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "step", step))
    indices = stream(len(latents.cache), config.seed, step * batch, batch)
    flips = coin_flips(config.seed, step * batch, batch) if config.data.flips else False
    noise = None if config.cache.use_mean else randn((batch, *latents.cache.latent_shape), generator)
    return latents.normalised(indices, noise, flips).cpu(), indices, generator


def _noised(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha x0 + sigma noise, [B, ...]."""
    return widen(schedule.alpha(t), x0) * x0 + widen(schedule.sigma(t), x0) * noise


@torch.no_grad()
def _info(config: ClassifierConfig, net: LatentClassifier, latents: Latents, device: torch.device) -> dict[str, Any]:
    """Facts to save with the weights: classes, how it was trained, accuracy and nats on held-out images by noise level."""
    images, labels = latents.images.held_out_batch(config.validation_images)
    assert labels is not None  # the training part has them
    posterior, use_mean = torch.Generator().manual_seed(derive_seed("validation", "posterior")), config.cache.use_mean
    x0 = torch.cat([latents.codec.latents(chunk, posterior, use_mean).cpu() for chunk in images.split(128)])
    noise = randn(x0.shape, torch.Generator().manual_seed(derive_seed("validation")))
    low, high = net.schedule.t_min, net.schedule.t_max
    scores: dict[str, Any] = {"images": len(x0), "t": [], "accuracy": [], "nats": []}
    for level in LEVELS:
        t = low + level * (high - low)
        x = _noised(net.schedule, x0, noise, torch.full((len(x0),), t, dtype=torch.float64))
        log_p = torch.cat([net.log_probs(part.to(device), t).cpu() for part in x.split(256)])  # [N, K]
        scores["t"].append(round(t, 4))
        scores["accuracy"].append(round(float((log_p.argmax(1) == labels).double().mean()), 4))
        scores["nats"].append(round(float(-log_p.gather(1, labels[:, None]).mean()), 4))
    return {
        "class_names": latents.images.class_names,
        "data": config.data.source,
        "data_fingerprint": latents.images.train.fingerprint(),
        "config": config.model_dump(mode="json"),
        "held_out": scores,
    }
