"""Stage 2: train a U-Net to denoise the latents of a frozen autoencoder, and publish the pipeline."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import DiffusionConfig
from latentdiff.data.shuffling import coin_flips, stream
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.models.unet import check_latent_size, check_unet, make_unet
from latentdiff.noise_levels import NoiseLevels, make_noise_levels
from latentdiff.objective import Uncertainty, diffusion_loss, loss_weight
from latentdiff.prediction import check_learnable
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.training import conditioning, distributed, messages, monitor, state, trainer
from latentdiff.training.accelerator import announcement, start_accelerator, wait_for_everyone
from latentdiff.training.attention import attention_kernel
from latentdiff.training.compile import compile_checked
from latentdiff.training.diffusion_checkpoint import picture, pipeline_parts, publish, published_scheduler
from latentdiff.training.dropout import SampleDropout, replace_dropout, set_keys
from latentdiff.training.ema import Ema
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents, open_inputs, prepare_latents, progress_bar
from latentdiff.training.logging import RunLogger
from latentdiff.training.loss_scale import LossScale
from latentdiff.training.micro_batch import find_micro_batch
from latentdiff.training.optimizer import clip_gradient, make_optimizer, set_learning_rate
from latentdiff.training.precision import OneProcess, Step, check_state, named, resolve
from latentdiff.training.random_data import STAND_IN, RandomCache, random_conditions
from latentdiff.training.run_folder import locked_run_folder, write_config
from latentdiff.utils.random import derive_seed, randn

VALIDATION = 2  # which definition of the validation loss a state's best value is of; 1 had posterior means and no weights
BUCKETS = 4  # of the training time interval, for the loss by noise level


@dataclass
class Parts:
    """Everything a step touches. `network` is what accelerate wrapped, `bare` the module in it (the U-Net, with its text
    encoder where that is trained too), `average` a copy that validation and pictures look at, filled from the EMA.

    In a sharded run `bare`, `ema` and the optimizer hold this process's rows; `average` is whole, and on the CPU meanwhile.

    balance(loss [B], t [B]) -> [B] is what is minimised: the loss as it is, or weighed by `uncertainty`, which it wraps.
    """

    latents: Latents
    conditions: conditioning.Conditions
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
    dropout: list[SampleDropout]
    scale: LossScale


def train_diffusion(config: DiffusionConfig, resume: bool = False) -> Path:
    """Train stage 2 as the config says; returns the folder of the published pipeline, <output>/model.

    Also written: run.json (the config), metrics.jsonl, logs/ (TensorBoard), pictures/, state/, and the latent cache where the
    config puts it.
    """
    output = Path(config.output)
    config = conditioning.with_recorded_dropout(config, output) if resume else config
    check_config(config)
    accelerator = start_accelerator(config.train, shards=True)
    with locked_run_folder(output, config, resume) as restores:
        _train(config, restores, accelerator, output)
    accelerator.end_training()
    return output / "model"


def _train(config: DiffusionConfig, resume: bool, accelerator: Any, output: Path) -> None:
    codec, images = open_inputs(config, accelerator.device)
    conditioning.check_data(config, images)
    latent_shape = codec.latent_shape(*images.preprocess.padded_size)
    check_latent_size(config, latent_shape, codec.factor)
    trial = partial(trial_steps, config, codec, images, latent_shape, len(images.class_names))
    config, precision = resolve(config, output, accelerator, trial, resume)
    config = find_micro_batch(config, accelerator, trial)
    accelerator = start_accelerator(config.train, shards=True)  # again: now at the precision that was chosen
    reader, cut = conditioning.open_text(config, images, accelerator, resume)
    warnings = [*messages.autoencoder_warnings(config.autoencoder), *messages.length_warnings(config)]
    warnings += [*messages.data_warnings(config, len(images.train)), *cut]
    announce = announcement(accelerator, config.train, precision, lines=messages.as_warnings(warnings))
    with progress_bar("encoding", accelerator.is_main_process, announce) as progress:
        latents = prepare_latents(config, accelerator, progress, (codec, images))
        torch.manual_seed(derive_seed(config.seed, "initialise"))
        told = conditioning.prepare_conditions(config, latents, accelerator, progress, reader)
    parts = make_parts(config, latents, told, accelerator)
    if config.train.compile:
        _compile(config, parts, accelerator)
    work = _work(config, parts, accelerator, output)
    progress = trainer.resume(output, work, accelerator, config.train.keep) if resume else trainer.Progress()
    announce()
    latents.images.say()
    if accelerator.is_main_process:
        write_config(output, config, resume)
        messages.print_lines([messages.where_results_appear(config)])
    with RunLogger(output, config.train.steps, progress.step, accelerator.is_main_process) as log:
        trainer.run_loop(config, work, accelerator, log, output, progress)
    accelerator.wait_for_everyone()
    parts.ema.copy_to(parts.average)
    if accelerator.is_main_process:
        publish(config, parts, output / "model", progress.step)
        messages.print_lines(messages.model_finished(config, told.shown([None])[0] if told.text else None))
    wait_for_everyone(accelerator)


def publish_state(config: DiffusionConfig, folder: Path, tensors: dict[str, Any], meta: dict[str, Any], output: Path) -> None:
    """Publish the averaged weights of a state or snapshot as the run would have published them had it ended there.

    The latent cache of the run is opened, or built again where it is not there any more.
    """
    accelerator = start_accelerator(config.train)
    with progress_bar("encoding", True, lambda: None) as progress:
        latents = prepare_latents(config, accelerator, progress, open_inputs(config, accelerator.device))
        reader, _ = conditioning.open_text(config, latents.images, accelerator, resume=True)
        told = conditioning.prepare_conditions(config, latents, accelerator, progress, reader)
    parts = make_parts(config, latents, told, accelerator)
    trainer.check_made_of(output, meta.get("made_of"), made_of(latents))
    state.load_into(parts.average, tensors["ema"], str(output))
    parts.ema.updates = meta["ema_updates"]
    publish(config, parts, folder, meta["step"])


def trial_steps(
    config: DiffusionConfig,
    codec: LatentCodec,
    images: Images | None,
    shape: tuple[int, int, int],
    class_count: int,
    alone: OneProcess,
) -> Step:
    """Steps of a U-Net as the run will have it, on random latents [c, h, w], labels and captions: before any is encoded."""
    told = random_conditions(config, images, class_count)
    cache: Any = RandomCache(shape, len(images.train) if images else STAND_IN)
    parts = make_parts(config, Latents(codec, images, cache), told, alone)  # type: ignore[arg-type]
    parts.network.train()

    def step(precision: str, batch: int) -> None:
        alone.precision = precision
        train_step(named(config, precision, batch), parts, alone, 0, config.optimizer.lr)

    return step


def made_of(latents: Latents) -> dict[str, Any]:
    """What a state depends on besides the config: images, first stage and normaliser."""
    identity, codec = latents.cache.manifest["identity"], latents.codec
    normaliser = [codec.shift.flatten().tolist(), codec.scale.flatten().tolist()]
    return {"data": identity["data"], "autoencoder": identity["autoencoder"], "normaliser": normaliser}


def check_config(config: DiffusionConfig) -> None:
    """Refuse, before anything is encoded, names and combinations that would fail only when the run builds or publishes."""
    _noise(config)
    monitor.check(config)
    conditioning.check(config)
    check_unet(config)
    if config.train.compile and distributed.asked():
        raise UserError("train.compile: a network sharded by accelerate launch --use_fsdp runs uncompiled; set it to false")
    if config.train.precision == "float16" and distributed.asked():
        raise UserError("train.precision: float16 is not supported by accelerate launch --use_fsdp; use bfloat16 or float32")
    if config.train.micro_batch == "auto" and distributed.asked():
        raise UserError(
            "train.micro_batch: auto tries one process by itself, which a network sharded by accelerate launch --use_fsdp may "
            "not fit; give a number"
        )


def _noise(config: DiffusionConfig) -> tuple[NoiseSchedule, NoiseLevels]:
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    published_scheduler(config, schedule)
    check_learnable(config.prediction, schedule, config.weighting, config.schedule.name)
    return schedule, make_noise_levels(config.noise_levels.name, schedule, **config.noise_levels.params)


def make_parts(config: DiffusionConfig, latents: Latents, told: conditioning.Conditions, accelerator) -> Parts:
    """All that a step uses: networks, optimizer, EMA, schedule and noise levels."""
    schedule, levels = _noise(config)
    rows = told.classes.num_embeddings if told.classes else None
    unet = make_unet(config, latents.cache.latent_shape, rows, told.text.prompt_encoder.width if told.text else None)
    bare = conditioning.network_of(unet, told)
    average = copy.deepcopy(bare).eval().requires_grad_(False)
    if not distributed.sharded(accelerator):
        average.to(accelerator.device)
    dropout = replace_dropout(bare)
    if config.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    uncertainty = Uncertainty(schedule) if config.weighting == "uncertainty" else None
    network, balance, optimizer = _shared_out(config, bare, uncertainty, accelerator)
    denoiser = Denoiser(unet_model(network, schedule), schedule, config.prediction)
    ema = Ema(bare, config.ema.decay, config.ema.power)
    return Parts(
        latents,
        told,
        schedule,
        levels,
        network,
        bare,
        average,
        optimizer,
        ema,
        denoiser,
        uncertainty,
        balance,
        dropout,
        LossScale(config.train.precision, accelerator.device),
    )


def _shared_out(
    config: DiffusionConfig, bare: nn.Module, uncertainty: Uncertainty | None, accelerator: Any
) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Any]:
    """(network, balance, optimizer) of `Parts`: DDP's copies, or sharded, where the optimizer has to be of the pieces."""
    network: nn.Module = bare
    balance: Any = uncertainty
    sharded = distributed.sharded(accelerator)
    if sharded:
        network = distributed.shard(bare, accelerator)
        balance = None if uncertainty is None else distributed.replicate(uncertainty, accelerator)
    groups: list[dict[str, Any]] = [{"params": bare.parameters()}]
    if uncertainty is not None:
        groups.append({"params": uncertainty.parameters(), "weight_decay": 0.0})
    optimizer: Any = make_optimizer(groups, config.optimizer)
    if not sharded and uncertainty is None:
        network, optimizer = accelerator.prepare(bare, optimizer)
    elif not sharded:
        network, balance, optimizer = accelerator.prepare(bare, uncertainty, optimizer)
    return network, _unchanged if balance is None else balance, optimizer


def _unchanged(loss: Tensor, t: Tensor) -> Tensor:
    return loss


def _work(config: DiffusionConfig, parts: Parts, accelerator: Any, output: Path) -> trainer.Work:
    held = _validation_set(config, parts)
    net = monitor.load_net(config, accelerator.device)
    watch = net and monitor.Monitor(config, parts.latents, parts.conditions, net, accelerator)
    parts.network.train()

    def after(done: int) -> dict[str, float]:
        periods = config.train.picture_every, config.evaluate.every
        pictured, measured = (every and (done % every == 0 or done == config.train.steps) for every in periods)
        if not pictured and not measured:
            return {}
        parts.average.to(accelerator.device)
        metrics = _validate(config, parts, accelerator, held)  # leaves the averaged weights in `average`
        if watch and measured:
            metrics |= watch.measure(pipeline_parts(config, parts))
        if pictured:
            picture(config, parts, accelerator, output / "pictures" / f"step-{done:06d}.png")
        if distributed.sharded(accelerator):
            parts.average.to("cpu")
        return metrics

    def tensors() -> dict[str, dict[str, Tensor]]:
        found = {"model": parts.bare.state_dict(), "ema": parts.ema.state()}
        found["optimizer"] = state.optimizer_tensors(parts.optimizer)
        found |= {"uncertainty": parts.uncertainty.state_dict()} if parts.uncertainty is not None else {}
        return found | ({"loss_scale": parts.scale.state()} if parts.scale.enabled else {})

    def restore(found: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
        check_state(meta, config, output)
        state.load_into(parts.bare, found["model"], str(output))
        parts.ema.restore(found["ema"], meta["ema_updates"])
        if parts.uncertainty is not None:
            state.load_into(parts.uncertainty, found["uncertainty"], str(output))
        state.restore_optimizer(parts.optimizer, found["optimizer"])
        parts.scale.restore(found.get("loss_scale", {}))
        watched = config.train.best or ""
        if watched.startswith("validation/") and meta.get("validation") != VALIDATION and meta.get("best") is not None:
            # Held against the new numbers, the old ones would say that nothing improves any more, or that everything does
            meta["best"] = None
            if accelerator.is_main_process:
                print(
                    f"warning: {watched} was computed otherwise when this state was saved; train.best begins anew",
                    file=sys.stderr,
                )

    return trainer.Work(
        step=lambda step, lr: train_step(config, parts, accelerator, step, lr),
        after=after,
        tensors=tensors,
        meta=lambda: {"ema_updates": parts.ema.updates, "precision": config.train.precision, "validation": VALIDATION},
        restore=restore,
        samples=lambda step: _indices(config, parts, step),
        lowered=parts.scale.lowered,
        made_of=made_of(parts.latents),
    )


def _compile(config: DiffusionConfig, parts: Parts, accelerator: Any) -> None:
    """Compile the network, held against eager on the first step's batch; UserError where they disagree."""
    drawn, device = _draw(config, parts, accelerator, 0), accelerator.device
    piece = trainer.shares(len(drawn["x0"]), config.train.micro_batch)[0]
    conditioning = {name: value[piece] for name, value in drawn["conditions"].items()}
    set_keys(parts.dropout, config.seed, 0, drawn["rows"][piece])
    denoiser = Denoiser(unet_model(parts.bare.train(), parts.schedule), parts.schedule, config.prediction)

    def loss() -> Tensor:
        x0, noise, t = (drawn[name][piece].to(device) for name in ("x0", "noise", "t"))
        with accelerator.autocast():
            return diffusion_loss(denoiser, x0, t, noise, **conditioning).mean()

    with _attention(config, parts, accelerator):  # as in a step, or what is compiled there was not held against eager
        compile_checked(parts.bare, [parts.bare], loss, config.train.precision)


def _attention(config: DiffusionConfig, parts: Parts, accelerator: Any) -> AbstractContextManager[None]:
    height, width = parts.latents.cache.latent_shape[1:]
    return attention_kernel(accelerator.device, config.train.precision, height * width)


def _indices(config: DiffusionConfig, parts: Parts, step: int) -> Tensor:
    """The training images of a step's global batch, int64 [batch_size]."""
    batch = config.train.batch_size
    return stream(len(parts.latents.cache), config.seed, step * batch, batch)


def _draw(config: DiffusionConfig, parts: Parts, accelerator: Any, step: int) -> dict[str, Any]:
    """This process's rows of a step's batch. All that is random is drawn for the global batch from (seed, step).

    So N processes together take the step that one process with the whole batch takes, and a resumed run the step it
    would have taken.
    """
    batch, local = config.train.batch_size, config.train.batch_size // accelerator.num_processes
    mine = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "step", step))
    shape = (batch, *parts.latents.cache.latent_shape)
    posterior_noise, noise = randn(shape, generator)[mine], randn(shape, generator)[mine]
    t = parts.levels.sample(batch, generator)[mine]
    draws = {name: values[mine] for name, values in parts.conditions.draw(batch, generator).items()}
    indices = _indices(config, parts, step)[mine]
    flips = coin_flips(config.seed, step * batch, batch)[mine] if config.data.flips else False
    x0 = parts.latents.normalised(indices, None if config.cache.use_mean else posterior_noise, flips)
    return {
        "x0": x0,
        "noise": noise,
        "t": t,
        "rows": torch.arange(batch)[mine],
        "conditions": parts.conditions(indices, draws, accelerator.device),
    }


def train_step(
    config: DiffusionConfig, parts: Parts, accelerator: Any, step: int, lr: float
) -> tuple[dict[str, tuple[Tensor, int]], bool]:
    """One update, its batch taken through the network in pieces of train.micro_batch; none where it is not finite."""
    set_learning_rate(parts.optimizer, lr)
    drawn, device = _draw(config, parts, accelerator, step), accelerator.device
    count, losses, totals = len(drawn["x0"]), [], []
    pieces = trainer.shares(count, config.train.micro_batch)
    wrapped = [parts.network, *([parts.balance] if isinstance(parts.balance, nn.Module) else [])]
    for piece in pieces:
        x0, noise, t = (drawn[name][piece] for name in ("x0", "noise", "t"))
        conditions = {name: value[piece] for name, value in drawn["conditions"].items()}
        set_keys(parts.dropout, config.seed, step, drawn["rows"][piece])
        with trainer.accumulating(wrapped, piece is pieces[-1]), _attention(config, parts, accelerator):
            loss = diffusion_loss(
                parts.denoiser,
                x0.to(device),
                t.to(device),
                noise.to(device),
                config.weighting,
                config.min_snr_gamma,
                **conditions,
            )  # [B], B samples in this piece
            loss = loss * parts.levels.correction(t).to(loss)
            total = parts.balance(loss, t.to(device)).sum() / count
            accelerator.backward(parts.scale.scaled(total))
        losses.append(loss.detach())
        totals.append(total.detach())
    parts.scale.unscale(parts.optimizer)
    norm = clip_gradient(parts.bare, config.optimizer.clip)
    learnt = [p.grad for p in parts.uncertainty.parameters()] if parts.uncertainty is not None else []
    if good := math.isfinite(norm) and all(bool(g.isfinite().all()) for g in learnt if g is not None):
        parts.optimizer.step()
        parts.scale.stepped()
        parts.ema.update(parts.bare)
    parts.optimizer.zero_grad(set_to_none=True)
    values = {"loss": (torch.stack(totals).sum(), count), "gradient_norm": (torch.tensor(norm), 1)}
    values |= parts.scale.logged()
    return values | _by_noise_level(parts.schedule, drawn["t"], torch.cat(losses)), good


def _by_noise_level(schedule: NoiseSchedule, t: Tensor, loss: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Mean loss in each quarter of the usable time interval, and of how many samples."""
    share = (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
    bucket = (share * BUCKETS).long().clamp(0, BUCKETS - 1)
    losses = loss.cpu()
    inside = [losses[bucket == k] for k in range(BUCKETS)]
    return {f"loss_quarter{k + 1}": (some.mean(), len(some)) for k, some in enumerate(inside)}


def _validation_set(config: DiffusionConfig, parts: Parts) -> dict[str, Tensor]:
    """Held-out latents, drawn as those of training are, with fixed noises and stratified t: the same numbers at every step."""
    images, labels = parts.latents.images.held_out_batch(config.validation_images)
    codec, generator = parts.latents.codec, torch.Generator().manual_seed(derive_seed("validation"))
    posterior = torch.Generator().manual_seed(derive_seed("validation", "posterior"))
    x0 = torch.cat([codec.latents(chunk, posterior, config.cache.use_mean).cpu() for chunk in images.split(128)])
    t = parts.levels.midpoints(len(x0))[torch.randperm(len(x0), generator=generator)]
    texts = parts.latents.images.held_out_captions(config.validation_images)
    return {"x0": x0, "noise": randn(x0.shape, generator), "t": t, **parts.conditions.of(labels, texts, "cpu")}


@torch.no_grad()
def _validate(config: DiffusionConfig, parts: Parts, accelerator, held: dict[str, Tensor]) -> dict[str, float]:
    """Validation loss of the raw and of the averaged weights; each process computes its share of the samples.

    validation/loss_raw and loss_ema are means of what training minimises: weighted, corrected for the levels' density, and
    balanced by the learned uncertainty where there is one. validation/error_raw and error_ema are the plain squared error
    of the prediction, logged where that is another number.
    Both are computed by `average`, the averaged weights last: a sharded network would have to be run alike on all processes.
    """
    values, count = {}, len(held["x0"])
    names = ("loss", "error") if _weighs(config, parts) else ("loss",)
    mine = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
    denoiser = Denoiser(unet_model(parts.average, parts.schedule), parts.schedule, config.prediction)
    for name, weights in (("raw", parts.bare.state_dict()), ("ema", parts.ema.state())):
        distributed.fill(parts.average, weights)
        found = torch.zeros(len(names), count, device=accelerator.device)
        for rows in mine.split(128) if len(mine) else ():
            batch = {key: value[rows].to(accelerator.device) for key, value in held.items()}
            x0, t, noise = (batch.pop(key) for key in ("x0", "t", "noise"))
            with accelerator.autocast():
                error = diffusion_loss(denoiser, x0, t, noise, **batch)
            found[:, rows.to(found.device)] = torch.stack([_minimised(config, parts, error, t), error])[: len(names)]
        for kind, mean in zip(names, accelerator.reduce(found, "sum").mean(1).tolist(), strict=True):
            values[f"validation/{kind}_{name}"] = mean
    return values


def _minimised(config: DiffusionConfig, parts: Parts, error: Tensor, t: Tensor) -> Tensor:
    """What training minimises, [B], for the prediction's squared errors [B] at t [B]."""
    weight = loss_weight(config.weighting, config.prediction, parts.schedule, t, config.min_snr_gamma)
    loss = error * weight.to(error) * parts.levels.correction(t).to(error)
    return loss if parts.uncertainty is None else parts.uncertainty(loss, t)


def _weighs(config: DiffusionConfig, parts: Parts) -> bool:
    """Whether what is minimised is another number than the squared error of the prediction."""
    t = parts.levels.midpoints(2)
    return config.weighting != "none" or not bool((parts.levels.correction(t) == 1).all())
