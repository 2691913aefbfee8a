"""Stage 2: train a U-Net to denoise the latents of a frozen autoencoder, and publish the pipeline."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff import checkpoints, samplers
from latentdiff.config import DiffusionConfig
from latentdiff.data.order import coin_flips, stream
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.noise_levels import NoiseLevels, make_noise_levels
from latentdiff.objective import Uncertainty, diffusion_loss
from latentdiff.rng import derive_seed, randn
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.training import conditions, run, state
from latentdiff.training.ema import Ema
from latentdiff.training.latents import Latents, prepare_latents, progress_bar
from latentdiff.training.unets import check_unet, make_unet

PROMPTS = 8  # that a picture shows while training, where the config names none
BUCKETS = 4  # of the training time interval, for the loss by noise level


@dataclass
class Parts:
    """Everything a step touches. `network` is what accelerate wrapped, `bare` the module in it (the U-Net, with its text
    encoder where that is trained too), `average` its EMA copy.

    balance(loss [B], t [B]) -> [B] is what is minimised: the loss as it is, or weighed by `uncertainty`, which it wraps.
    """

    latents: Latents
    conditions: conditions.Conditions
    schedule: NoiseSchedule
    levels: NoiseLevels
    network: nn.Module
    bare: nn.Module
    average: nn.Module
    optimizer: Any
    ema: Ema
    denoiser: Denoiser
    uncertainty: Uncertainty | None
    balance: Callable[[Tensor, Tensor], Tensor]


def train_diffusion(config: DiffusionConfig, resume: bool = False) -> Path:
    """Train stage 2 as the config says; returns the folder of the published pipeline, <output>/model.

    Also written: run.json (the config), metrics.jsonl, logs/ (TensorBoard), pictures/, state/, and the latent cache where the
    config puts it.
    """
    output = Path(config.output)
    run.check_output(output, config, resume)
    _check(config)
    accelerator = run.start_accelerator(config.train)
    announce = run.announcement(accelerator, config.train)
    with progress_bar("encoding", accelerator.is_main_process, announce) as progress:
        latents = prepare_latents(config, accelerator, progress, partial(conditions.check_data, config))
        torch.manual_seed(derive_seed(config.seed, "initialise"))
        told = conditions.prepare_conditions(config, latents, accelerator, progress, resume)
    parts = _parts(config, latents, told, accelerator)
    start = _resume(output, parts) if resume else 0
    announce()
    if accelerator.is_main_process:
        run.write_config(output, config)
        if parts.ema.memory() > config.train.steps / 2:
            print(f"warning: the EMA looks back {parts.ema.memory():.0f} steps, the run has {config.train.steps}; "
                  "lower ema.decay or its pictures lag behind", file=sys.stderr)  # fmt: skip
    with run.Journal(output, config.train.steps, start, accelerator.is_main_process) as journal:
        _loop(config, parts, accelerator, journal, output, start)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        parts.ema.copy_to(parts.average)
        _publish(config, parts, output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "model"


def _check(config: DiffusionConfig) -> None:
    """Refuse, before anything is encoded, names and combinations that would fail only when the run builds or publishes."""
    _noise(config)
    conditions.check(config)
    check_unet(config)


def _noise(config: DiffusionConfig) -> tuple[NoiseSchedule, NoiseLevels]:
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    _scheduler(config, schedule)
    return schedule, make_noise_levels(config.noise_levels.name, schedule, **config.noise_levels.params)


def _scheduler(config: DiffusionConfig, schedule: NoiseSchedule) -> Any:
    """The diffusers scheduler that is published, None where the checkpoint names one of latentdiff's samplers instead.

    UserError where the schedule or the prediction has no scheduler of that name, or latentdiff no such sampler.
    """
    wanted = config.sample
    name = schedule.default_scheduler if wanted.scheduler == "auto" else wanted.scheduler
    if name is not None:
        if wanted.sampler is not None:
            raise UserError(f"sample.sampler: {wanted.sampler} would not run beside a scheduler; set sample.scheduler=null")
        return schedule.to_scheduler(name, config.prediction, **wanted.scheduler_config)
    if wanted.scheduler_config:
        raise UserError(f"sample.scheduler_config: {config.schedule.name} runs without a scheduler; leave it out")
    if wanted.sampler not in (None, *samplers.names()):
        raise UserError(f"sample.sampler: {wanted.sampler!r} is unknown; valid: {', '.join(samplers.names())}")
    return None


def _parts(config: DiffusionConfig, latents: Latents, told: conditions.Conditions, accelerator) -> Parts:
    schedule, levels = _noise(config)
    rows = told.classes.num_embeddings if told.classes else None
    unet = make_unet(config, latents.cache.latent_shape, rows, told.text.prompts.width if told.text else None)
    bare = conditions.network_of(unet, told)
    average = copy.deepcopy(bare).to(accelerator.device).eval().requires_grad_(False)
    uncertainty = Uncertainty(schedule) if config.weighting == "uncertainty" else None
    if uncertainty is None:
        optimizer = run.make_optimizer(bare.parameters(), config.optimizer)
        network, optimizer = accelerator.prepare(bare, optimizer)
        balance = _unchanged
    else:
        groups = [{"params": bare.parameters()}, {"params": uncertainty.parameters(), "weight_decay": 0.0}]
        optimizer = run.make_optimizer(groups, config.optimizer)
        network, balance, optimizer = accelerator.prepare(bare, uncertainty, optimizer)
    denoiser = Denoiser(unet_model(network, schedule), schedule, config.prediction)
    ema = Ema(bare, config.ema.decay, config.ema.power)
    return Parts(latents, told, schedule, levels, network, bare, average, optimizer, ema, denoiser, uncertainty, balance)


def _unchanged(loss: Tensor, t: Tensor) -> Tensor:
    return loss


def _loop(config: DiffusionConfig, parts: Parts, accelerator, journal: run.Journal, output: Path, start: int) -> None:
    steps = config.train.steps
    clock, averages = run.SaveClock(config.train.save_minutes), run.Averages()
    validation = _validation_set(config, parts) if accelerator.is_main_process else None
    parts.network.train()
    for step in range(start, steps):
        run.set_learning_rate(parts.optimizer, run.learning_rate(config.optimizer, step, steps))
        averages.add(_step(config, parts, accelerator, step))
        journal.advance()
        if (step + 1) % config.train.log_every == 0 or step + 1 == steps:
            lr = run.learning_rate(config.optimizer, step, steps)
            journal.log(step + 1, {f"train/{k}": v for k, v in averages.take().items()} | {"lr": lr})
        if accelerator.is_main_process:
            if validation is not None and ((step + 1) % config.train.picture_every == 0 or step + 1 == steps):
                journal.log(step + 1, _validate(config, parts, accelerator, validation))
                _picture(config, parts, output / "pictures" / f"step-{step + 1:06d}.png")
            if clock.due() or step + 1 == steps:
                tensors = {"model": parts.bare.state_dict(), "ema": parts.ema.state()}
                tensors["optimizer"] = state.optimizer_tensors(parts.optimizer)
                if parts.uncertainty is not None:
                    tensors["uncertainty"] = parts.uncertainty.state_dict()
                state.save_state(output, step + 1, tensors, {"ema_updates": parts.ema.updates}, config.train.keep)


def _step(config: DiffusionConfig, parts: Parts, accelerator, step: int) -> dict[str, Tensor]:
    """One update. All that is random is drawn for the global batch from (seed, step) and shared out by rows.

    So N processes together take the step that one process with the whole batch takes, and a resumed run the step it
    would have taken.
    """
    batch, device = config.train.batch_size, accelerator.device
    local = batch // accelerator.num_processes
    mine = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "step", step))
    shape = (batch, *parts.latents.cache.latent_shape)
    posterior_noise, noise = randn(shape, generator)[mine], randn(shape, generator)[mine]
    t = parts.levels.sample(batch, generator)[mine]
    draws = {name: values[mine] for name, values in parts.conditions.draw(batch, generator).items()}
    indices = stream(len(parts.latents.cache), config.seed, step * batch, batch)[mine]
    flips = coin_flips(config.seed, step * batch, batch)[mine] if config.data.flips else False
    x0 = parts.latents.normalised(indices, None if config.cache.use_mean else posterior_noise, flips)
    conditioning = parts.conditions(indices, draws, device)
    torch.manual_seed(derive_seed(config.seed, "dropout", step, accelerator.process_index))
    loss = diffusion_loss(
        parts.denoiser, x0.to(device), t.to(device), noise.to(device), config.weighting, config.min_snr_gamma, **conditioning
    )  # [B]
    loss = loss * parts.levels.correction(t).to(loss)
    total = parts.balance(loss, t.to(device)).mean()
    accelerator.backward(total)
    norm = run.gradient_norm(parts.bare, config.optimizer.clip)
    parts.optimizer.step()
    parts.optimizer.zero_grad(set_to_none=True)
    parts.ema.update(parts.bare)
    return {"loss": total, "gradient_norm": torch.tensor(norm), **_by_noise_level(parts.schedule, t, loss)}


def _by_noise_level(schedule: NoiseSchedule, t: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Mean loss in each quarter of the usable time interval that has a sample."""
    share = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    bucket = (share * BUCKETS).long().clamp(0, BUCKETS - 1)
    losses = loss.detach().cpu()
    return {f"loss_quarter{k + 1}": losses[bucket == k].mean() for k in range(BUCKETS) if bool((bucket == k).any())}


def _validation_set(config: DiffusionConfig, parts: Parts) -> dict[str, Tensor]:
    """Held-out latents with fixed noise and stratified t: the same numbers at every step and in every run."""
    images, labels = parts.latents.images.held_out_batch(config.validation_images)
    codec = parts.latents.codec
    x0 = torch.cat([codec.normalise(codec.moments(chunk)[0]).cpu() for chunk in images.split(128)])
    generator = torch.Generator().manual_seed(derive_seed("validation"))
    t = parts.levels.midpoints(len(x0))[torch.randperm(len(x0), generator=generator)]
    texts = parts.latents.images.held_out_captions(config.validation_images)
    return {"x0": x0, "noise": randn(x0.shape, generator), "t": t, **parts.conditions.of(labels, texts, "cpu")}


@torch.no_grad()
def _validate(config: DiffusionConfig, parts: Parts, accelerator, held: dict[str, Tensor]) -> dict[str, float]:
    """Validation loss of the raw and of the averaged weights."""
    parts.ema.copy_to(parts.average)
    parts.bare.eval()
    values = {}
    for name, network in (("raw", parts.bare), ("ema", parts.average)):
        denoiser = Denoiser(unet_model(network, parts.schedule), parts.schedule, config.prediction)
        losses = []
        for rows in torch.arange(len(held["x0"])).split(128):
            batch = {key: value[rows].to(accelerator.device) for key, value in held.items()}
            with accelerator.autocast():
                losses.append(diffusion_loss(denoiser, batch.pop("x0"), batch.pop("t"), batch.pop("noise"), **batch))
        values[f"validation/loss_{name}"] = float(torch.cat(losses).mean())
    parts.bare.train()
    return values


def _pipeline_parts(config: DiffusionConfig, parts: Parts) -> dict[str, Any]:
    scheduler = _scheduler(config, parts.schedule)
    return {
        **conditions.pipeline_pieces(parts.average, parts.conditions, parts.latents.images.class_names),
        "vae": parts.latents.codec.vae,
        "scheduler": scheduler,
        "default_sampler": (config.sample.sampler or "dpmpp_2m") if scheduler is None else None,
        "image_size": parts.latents.images.preprocess.content[2:],
        "prediction": config.prediction,
        "schedule": {"name": config.schedule.name, **config.schedule.params},
    }


@torch.no_grad()
def _picture(config: DiffusionConfig, parts: Parts, path: Path) -> None:
    """A grid of samples of the averaged weights, one row per class, from fixed seeds; written while training."""
    from latentdiff.pictures import save_rows
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.rng import generators

    pipeline = LatentDiffusionPipeline(**_pipeline_parts(config, parts))
    pipeline.set_progress_bar_config(disable=True)
    classes = list(range(min(10, pipeline.num_classes))) or [None] * PROMPTS
    prompts = None
    if parts.conditions.text:
        prompts = config.sample.prompts or parts.conditions.text.captions.spread(len(classes))
        classes = [classes[k % len(classes)] for k in range(len(prompts))]
    images = pipeline(
        prompt=prompts, class_labels=classes, num_images_per_label=config.sample.per_class,
        guidance_scale=conditions.guidance(config),
        guidance_interval=config.sample.guidance_interval,
        num_inference_steps=config.sample.steps,
        generator=generators(config.seed, range(len(classes) * config.sample.per_class)), output_type="pt",
    ).images  # fmt: skip
    save_rows(list((images.cpu() * 2 - 1).split(config.sample.per_class)), path)


def _publish(config: DiffusionConfig, parts: Parts, output: Path) -> None:
    """Write the averaged weights, the frozen first stage and how they were made as a diffusers folder."""
    cache = parts.latents.cache
    statistics = cache.statistics()
    meta = {
        "config": config.model_dump(mode="json"),
        "steps": config.train.steps,
        "ema": {"decay": config.ema.decay, "power": config.ema.power, "updates": parts.ema.updates},
        "data": {"source": config.data.source, "images": len(cache), "fingerprint": parts.latents.images.train.fingerprint()},
        "autoencoder": {"fingerprint": parts.latents.codec.fingerprint()},
        "latents": {"shape": list(cache.latent_shape), "mean": statistics.mean.tolist(), "std": statistics.std.tolist(),
                    "posterior_share": statistics.posterior_share.tolist()},
    }  # fmt: skip
    pieces = _pipeline_parts(config, parts)
    checkpoints.publish(
        output / "model", **pieces, meta=meta, default_guidance_scale=conditions.guidance(config),
        default_guidance_interval=config.sample.guidance_interval, default_num_inference_steps=config.sample.steps,
    )  # fmt: skip


def _resume(output: Path, parts: Parts) -> int:
    tensors, meta = state.load_state(output)
    state.load_into(parts.bare, tensors["model"], str(output))
    parts.ema.restore(tensors["ema"], meta["ema_updates"])
    if parts.uncertainty is not None:
        state.load_into(parts.uncertainty, tensors["uncertainty"], str(output))
    state.restore_optimizer(parts.optimizer, tensors["optimizer"])
    return meta["step"]
