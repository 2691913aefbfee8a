"""Stage 2: train a U-Net to denoise the latents of a frozen autoencoder, and publish it as a pipeline.

`train_diffusion` sets a run up. `DiffusionTrainer.train_step` is one training step; `trainer.Trainer.run` repeats it.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import DiffusionConfig, DiscreteConfig
from latentdiff.data.shuffling import coin_flips, stream
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.models.codec import LatentCodec
from latentdiff.models.unet import check_unet, check_unet_size, make_unet
from latentdiff.noise_levels import NoiseLevels, make_noise_levels
from latentdiff.objective import Uncertainty, add_noise, diffusion_loss, loss_weight, weighted_error
from latentdiff.prediction import check_learnable
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.training import bridge, conditioning, distributed, lora, messages, monitor, run_clock, state
from latentdiff.training.accelerator import announcement, start_accelerator
from latentdiff.training.attention import attention_kernel
from latentdiff.training.compile import compile_checked
from latentdiff.training.diffusion_checkpoint import pipeline_parts, published_scheduler, save_checkpoint
from latentdiff.training.dropout import replace_dropout, set_keys
from latentdiff.training.ema import Ema
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents, cached_shape, open_inputs, prepare_latents, progress_bar
from latentdiff.training.logging import RunLogger, Values
from latentdiff.training.micro_batch import find_micro_batch
from latentdiff.training.optimizer import clip_gradient, make_optimizer, set_learning_rate
from latentdiff.training.precision import OneProcess, Step, check_state, named, resolve
from latentdiff.training.random_data import STAND_IN, RandomCache, random_conditions
from latentdiff.training.run_folder import locked_run_folder, write_config
from latentdiff.training.trainer import Tensors, Trainer, accumulating, micro_batches
from latentdiff.utils import progress_bars
from latentdiff.utils.random import derive_seed, randn

VALIDATION = 2  # version of the validation loss; 1 was computed on posterior means, without weights
QUARTERS = 4  # parts of the time interval for which the loss is logged separately


def train_diffusion(config: DiffusionConfig, resume: bool = False, began: float | None = None) -> Path:
    """Train stage 2 and return the folder of the published pipeline, <output>/model.

    Also written: run.json (the config), metrics.jsonl, logs/ (TensorBoard), pictures/, state/, and the latent cache.

    Args:
        config: of stage "diffusion".
        resume: continue the run in config.output from its newest training state.
        began: when the run was called, by `run_clock.now`; None: now. Its minutes count from then.

    Raises:
        UserError: a mistake in the config, the data or the output folder. Nothing was written then.
    """
    return run_stage(config, resume, began, check_config, DiffusionTrainer)


def run_stage(
    config: DiffusionConfig | DiscreteConfig,
    resume: bool,
    began: float | None,
    check: Callable[[Any], None],
    trainer_class: type[DiffusionTrainer],
) -> Path:
    """A whole run of stage 2, of either kind; arguments, result and errors as `train_diffusion`.

    check: refuses a config that cannot work. trainer_class: the training step, and what is made of it.
    """
    began = run_clock.now() if began is None else began
    output = Path(config.output)
    config = conditioning.with_recorded_dropout(config, output) if resume else config
    check(config)
    accelerator = start_accelerator(config.train, shards=True)
    with locked_run_folder(output, config, resume) as resumes:
        _train(config, resumes, accelerator, began, trainer_class)
    return output / "model"


def _train(config: Any, resume: bool, accelerator: Any, began: float, trainer_class: type[DiffusionTrainer]) -> None:
    output = Path(config.output)

    # 1. The frozen autoencoder and the images. The latents' shape follows from both.
    codec, images = open_inputs(config, accelerator.device)
    conditioning.check_data(config, images)
    latent_shape = cached_shape(config, codec, images)
    check_unet_size(config, latent_shape, codec.factor)
    source_images = bridge.open_images(config, images, codec)

    # 2. Precision and micro-batch, where the config says auto: measured by a few steps on random data.
    trial = partial(trainer_class.trial_steps, config, codec, images, latent_shape, len(images.class_names))
    config, precision = resolve(config, output, accelerator, trial, resume)
    config = find_micro_batch(config, accelerator, trial)
    accelerator = start_accelerator(config.train, shards=True)  # again: now in the precision that was chosen

    # 3. What reads the captions. From here on nothing is refused any more, so the run prints what it has.
    reader, caption_warnings = conditioning.open_text(config, images, accelerator, resume)
    warnings = [*messages.autoencoder_warnings(config.autoencoder), *messages.length_warnings(config)]
    warnings += [*messages.data_warnings(config, len(images.train)), *caption_warnings]
    announce = announcement(accelerator, config.train, precision, lines=messages.as_warnings(warnings))

    # 4. The latent cache: each image is encoded once, before training.
    with progress_bar("encoding", accelerator.is_main_process, announce) as bar:
        latents = prepare_latents(config, accelerator, bar, (codec, images))
        source = bridge.open_source(config, latents, source_images, accelerator, bar)
        torch.manual_seed(derive_seed(config.seed, "initialise"))
        conditions = conditioning.prepare_conditions(config, latents, accelerator, bar, reader)

    # 5. The U-Net, its optimizer and its averaged weights; then the state of the run that is resumed.
    trainer = trainer_class(config, latents, conditions, accelerator, source)
    trainer.clock.began = began  # what came before counts too: encoding, say
    if config.train.compile:
        trainer.compile()
    trainer.prepare_validation()
    if resume:
        trainer.resume()

    # 6. Record the config, then train.
    announce()
    latents.images.print_report()
    if source_images is not None:
        source_images.print_report()
    if accelerator.is_main_process:
        write_config(output, config, resume)
        messages.print_lines([messages.where_results_appear(config)])
    steps, clock = config.train.steps, trainer.clock
    with RunLogger(output, steps, trainer.progress.step, accelerator, config.train.trackers, clock) as log:
        trainer.run(log)

    # 7. Publish the averaged weights.
    accelerator.wait_for_everyone()
    trainer.ema.copy_to(trainer.ema_model)
    if accelerator.is_main_process:
        trainer.publish(output / "model", trainer.progress.step)
        prompt = conditions.example_captions([None])[0] if conditions.text else None
        if progress_bars.alone():  # else the larger job says where its model is
            messages.print_lines(messages.model_finished(config, prompt))
    accelerator.wait_for_everyone()


def check_config(config: DiffusionConfig) -> None:
    """UserError, before anything is encoded, for names and combinations that would fail only later in the run."""
    bridge.check(config)
    make_noise(config)
    monitor.check(config)
    conditioning.check(config)
    lora.check(config)
    check_unet(config)
    check_launch(config)


def check_launch(config: DiffusionConfig | DiscreteConfig) -> None:
    """UserError for settings that a network sharded by `accelerate launch --use_fsdp` cannot have."""
    if not distributed.fsdp_requested():
        return
    by_fsdp = "sharded by accelerate launch --use_fsdp"
    if config.train.compile:
        raise UserError(f"train.compile: a network {by_fsdp} runs uncompiled; set it to false")
    if config.train.precision == "float16":
        raise UserError("train.precision: float16 is not supported by accelerate launch --use_fsdp; use bfloat16 or float32")
    if config.train.micro_batch == "auto":
        raise UserError(
            f"train.micro_batch: auto tries one process by itself, which a network {by_fsdp} may not fit; give a number"
        )


def make_noise(config: DiffusionConfig) -> tuple[NoiseSchedule, NoiseLevels]:
    """(noise schedule, distribution of training times) of a config. UserError where they do not go with the rest of it."""
    schedule = make_schedule(config.schedule.name, **config.schedule.params)
    published_scheduler(config, schedule)
    check_learnable(config.prediction, schedule, config.weighting, config.schedule.name)
    return schedule, make_noise_levels(config.noise_levels.name, schedule, **config.noise_levels.params)


@dataclass
class Batch:
    """What one process trains on at a step, or a piece of it: B samples.

    Attributes:
        x0: normalised latents, [B, c, h, w].
        noise: standard normal, of the same shape; in a bridge, normalised latents of its source.
        t: times, float64 [B]; 0 is data and 1 is noise.
        conditioning: keyword arguments of the U-Net, each [B, ...].
        rows: the samples' places in the global batch, int64 [B].
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    conditioning: dict[str, Tensor]
    rows: Tensor

    def piece(self, rows: slice, device: torch.device) -> Batch:
        """These rows of the batch, with x0, noise and t on a device. The conditioning is there already."""
        x0, noise, t = (values[rows].to(device) for values in (self.x0, self.noise, self.t))
        return Batch(x0, noise, t, {name: value[rows] for name, value in self.conditioning.items()}, self.rows[rows])


class DiffusionTrainer(Trainer):
    """Stage 2's data, networks and optimizer, and its training step.

    Attributes:
        latents: the latent cache, with the autoencoder and the images that it was made from.
        conditions: labels and captions of the training images.
        source: what a bridge starts from; None: training starts from noise.
        schedule: the noise schedule, alpha(t) and sigma(t).
        levels: the distribution that training times t are drawn from.
        model: the U-Net, together with its text encoder where that is trained too.
        parallel_model: `model` as accelerate (DDP) or FSDP2 wraps it; what a training step calls.
        ema: running averages of the model's weights.
        ema_model: a copy of the model for validation, pictures and publishing; filled from `ema`.
        trained: with model.lora, the names of the weights that are trained, averaged and saved; None: all of them.
        denoiser: the parallel model with its schedule and prediction.
        uncertainty: the learned weight of the loss (weighting: uncertainty), or None.
        parallel_uncertainty: `uncertainty` as accelerate wraps it.
        dropout: the model's dropout layers, whose masks follow from seed, step and sample.

    In a sharded run (FSDP2) `model`, `ema` and `optimizer` hold this process's rows of each tensor. `ema_model` is whole, and
    lies on the CPU while it is not used.
    """

    config: DiffusionConfig

    def __init__(
        self,
        config: DiffusionConfig,
        latents: Latents,
        conditions: conditioning.Conditions,
        accelerator: Any,
        source: bridge.Source | None = None,
    ):
        super().__init__(config, accelerator)
        self.latents, self.conditions, self.source = latents, conditions, source
        self.uncertainty: Uncertainty | None = None
        self.make_process()

        # The network, and a copy of it for the averaged weights
        classes, text = conditions.classes, conditions.text
        unet = self.make_network(classes and classes.num_embeddings, text and text.prompt_encoder.width)
        self.trained: set[str] | None = None
        if config.model.lora is not None:
            self.trained = lora.add_lora(unet, config.model.lora, config.seed)
        self.model = conditioning.network_of(unet, conditions)
        self.ema_model = copy.deepcopy(self.model).eval().requires_grad_(False)
        if not distributed.sharded(accelerator):
            self.ema_model.to(accelerator.device)
        self.dropout = replace_dropout(self.model)
        if config.train.gradient_checkpointing:
            unet.enable_gradient_checkpointing()

        # The optimizer, and one network for all processes
        self._distribute()
        self.denoiser = self.denoiser_of(self.parallel_model)
        self.ema = Ema(self.model, config.ema.decay, config.ema.power, self.trained)
        if self.trained is not None:
            lora.share_base(self.ema_model, self.model, self.trained)
        self.parallel_model.train()

    # What a noise process decides. Discrete diffusion has its own: see train_discrete.py

    def make_process(self) -> None:
        """Make the noise schedule, the distribution of training times, and the learned weight of the loss."""
        self.schedule, self.levels = make_noise(self.config)
        self.times = self.schedule.t_min, self.schedule.t_max
        if self.config.weighting == "uncertainty":
            self.uncertainty = Uncertainty(self.schedule)

    def make_network(self, class_rows: int | None, text_width: int | None) -> nn.Module:
        """The U-Net. class_rows: of the class embedding. text_width: of the text encoder's states."""
        names = self.latents.images.class_names if self.latents.images else []
        return make_unet(self.config, self.latents.cache.latent_shape, class_rows, text_width, names)

    def denoiser_of(self, network: nn.Module) -> Any:
        """The network with its schedule and prediction."""
        return Denoiser(unet_model(network, self.schedule), self.schedule, self.config.prediction)

    @classmethod
    def trial_steps(
        cls,
        config: Any,
        codec: LatentCodec,
        images: Images | None,
        shape: tuple[int, int, int],
        class_count: int,
        alone: OneProcess,
    ) -> Step:
        """step(precision, batch): training steps on random latents of shape (c, h, w), labels and captions, to be timed.

        They need no latent cache, so they can run before any image is encoded. images: None where they are not there.
        """
        cache: Any = RandomCache(shape, len(images.train) if images else STAND_IN, codec.num_codes)
        latents = Latents(codec, images, cache)  # type: ignore[arg-type]
        trainer = cls(config, latents, random_conditions(config, images, class_count, shape), alone)

        def step(precision: str, batch: int) -> None:
            alone.precision = precision
            trainer.config = named(config, precision, batch)
            trainer.train_step(0, config.optimizer.lr)

        return step

    def _distribute(self) -> None:
        """Wrap the networks for several processes, and make the optimizer: whole copies (DDP), or shards (FSDP2)."""
        accelerator, uncertainty = self.accelerator, self.uncertainty
        self.parallel_model: nn.Module = self.model
        self.parallel_uncertainty: nn.Module | None = uncertainty
        sharded = distributed.sharded(accelerator)
        if sharded:  # before the optimizer is made, which has to be of the shards
            self.parallel_model = distributed.shard(self.model, accelerator)
            self.parallel_uncertainty = uncertainty and distributed.replicate(uncertainty, accelerator)
        trained = [p for name, p in self.model.named_parameters() if self.trained is None or name in self.trained]
        groups: list[dict[str, Any]] = [{"params": trained}]
        if uncertainty is not None:
            groups.append({"params": uncertainty.parameters(), "weight_decay": 0.0})
        self.optimizer: Any = make_optimizer(groups, self.config.optimizer)
        if not sharded and uncertainty is None:
            self.parallel_model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        elif not sharded:
            prepared = accelerator.prepare(self.model, uncertainty, self.optimizer)
            self.parallel_model, self.parallel_uncertainty, self.optimizer = prepared

    # A training step

    def train_step(self, step: int, lr: float) -> tuple[Values, bool]:
        """One update of the weights; see `Trainer.train_step`. The loss is that of `losses`."""
        config, device = self.config, self.accelerator.device
        set_learning_rate(self.optimizer, lr)

        # Draw this process's share of the batch: latents, noise, times and conditions.
        batch = self.draw_batch(step)
        count, losses, totals = len(batch.x0), [], []

        # Take it through the network in pieces of train.micro_batch. Their gradients add up to those of the batch.
        pieces = micro_batches(count, config.train.micro_batch)
        wrapped = [module for module in (self.parallel_model, self.parallel_uncertainty) if module is not None]
        for rows in pieces:
            piece = batch.piece(rows, device)
            set_keys(self.dropout, config.seed, step, piece.rows)
            with accumulating(wrapped, last=rows is pieces[-1]), self._attention():
                loss = self.losses(piece)  # [B]
                total = self._balance(loss, piece.t).sum() / count
                self.accelerator.backward(self.loss_scale.scaled(total))
            losses.append(loss.detach())
            totals.append(total.detach())

        # Update the weights and their average, unless a gradient is not finite.
        self.loss_scale.unscale(self.optimizer)
        norm = clip_gradient(self.model, config.optimizer.clip)
        learned = [p.grad for p in self.uncertainty.parameters()] if self.uncertainty is not None else []
        finite = math.isfinite(norm) and all(bool(g.isfinite().all()) for g in learned if g is not None)
        if finite:
            self.optimizer.step()
            self.loss_scale.stepped()
            self.ema.update(self.model)
        self.optimizer.zero_grad(set_to_none=True)

        values = {"loss": (torch.stack(totals).sum(), count), "gradient_norm": (torch.tensor(norm), 1)}
        return values | self.loss_scale.logged() | self._loss_by_quarter(batch.t, torch.cat(losses)), finite

    def losses(self, piece: Batch) -> Tensor:
        """The weighted squared error of the prediction for each sample of a piece, [B]."""
        config, x0, noise, t = self.config, piece.x0, piece.noise, piece.t
        denoiser = self.denoiser

        # Add noise to the latents: x_t = alpha(t) x0 + sigma(t) noise.
        x_t = add_noise(self.schedule, x0, noise, t)

        # The network predicts the noise, or whatever config.prediction says, from x_t.
        output = denoiser.output(x_t, t, **piece.conditioning)

        # The loss of each sample. `correction` undoes that some times are drawn more often than others.
        loss = weighted_error(denoiser, output, x0, noise, t, config.weighting, config.min_snr_gamma)
        return loss * self.levels.correction(t).to(loss)

    def draw_batch(self, step: int) -> Batch:
        """This process's share of a step's batch, on the CPU but for the conditioning.

        Whatever is random is drawn for the global batch, from (seed, step) alone. So N processes together take the step
        that one process takes with the whole batch, and a resumed run takes the step it would have taken.
        """
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        size, local = config.train.batch_size, config.train.batch_size // world
        mine = slice(rank * local, (rank + 1) * local)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "step", step))
        shape = (size, *self.latents.cache.latent_shape)
        posterior_noise, noise = randn(shape, generator)[mine], randn(shape, generator)[mine]
        t = self.levels.sample(size, generator)[mine]
        draws = {name: values[mine] for name, values in self.conditions.draw(size, generator).items()}
        indices, flips = self.image_indices(step)[mine], self.image_flips(step, mine)
        x0 = self.latents.normalised(indices, None if config.cache.use_mean else posterior_noise, flips)
        if self.source is not None:
            noise = self.source.draw(step, noise, mine, size)
        conditioning = self.conditions(indices, draws, self.accelerator.device, flips)
        return Batch(x0, noise, t, conditioning, torch.arange(size)[mine])

    def image_indices(self, step: int) -> Tensor:
        """The training images of a step's global batch, int64 [batch_size]."""
        size = self.config.train.batch_size
        return stream(len(self.latents.cache), self.config.seed, step * size, size)

    def image_flips(self, step: int, mine: slice) -> Tensor | bool:
        """Which images of a process's share of a step's batch are mirrored, bool [B]; False where none is."""
        size = self.config.train.batch_size
        return coin_flips(self.config.seed, step * size, size)[mine] if self.config.data.flips else False

    def _balance(self, loss: Tensor, t: Tensor) -> Tensor:
        """What is minimised for losses [B] at times t [B]: themselves, or balanced by the learned uncertainty."""
        return loss if self.parallel_uncertainty is None else self.parallel_uncertainty(loss, t)

    def _attention(self) -> AbstractContextManager[None]:
        height, width = self.latents.cache.latent_shape[1:]
        return attention_kernel(self.accelerator.device, self.config.train.precision, height * width)

    def _loss_by_quarter(self, t: Tensor, loss: Tensor) -> dict[str, tuple[Tensor, int]]:
        """For each quarter of the usable time interval: the mean loss of its samples, and how many there are."""
        place = (t - self.times[0]) / (self.times[1] - self.times[0])
        quarter = (place * QUARTERS).long().clamp(0, QUARTERS - 1)
        inside = [loss.cpu()[quarter == k] for k in range(QUARTERS)]
        return {f"loss_quarter{k + 1}": (losses.mean(), len(losses)) for k, losses in enumerate(inside)}

    def compile(self) -> None:
        """Compile the network. UserError where it then computes something else than before, on the first step's batch."""
        batch, config = self.draw_batch(0), self.config
        piece = batch.piece(micro_batches(len(batch.x0), config.train.micro_batch)[0], self.accelerator.device)
        set_keys(self.dropout, config.seed, 0, piece.rows)
        denoiser = self.denoiser_of(self.model.train())

        def loss() -> Tensor:
            with self.accelerator.autocast():
                return self.errors(denoiser, piece).mean()

        with self._attention():  # as in a training step, so that what is compiled is what was compared
            compile_checked(self.model, [self.model], loss, config.train.precision)

    def errors(self, denoiser: Any, piece: Batch) -> Tensor:
        """The squared error of the prediction of a denoiser for each sample, without weights: [B]."""
        return diffusion_loss(denoiser, piece.x0, piece.t, piece.noise, **piece.conditioning)

    # Validation and pictures

    def prepare_validation(self) -> None:
        """Make what `after_step` needs: the validation set, and the feature network of evaluate.every."""
        config, device = self.config, self.accelerator.device
        self.validation = self.validation_set()
        net = monitor.load_net(config, device)
        self.monitor = net and monitor.Monitor(config, self.latents, self.conditions, net, self.accelerator)

    def after_step(self, done: int) -> dict[str, float]:
        """Where it is due: the validation loss, a distance of pictures from the data, and a grid of pictures."""
        config, device = self.config, self.accelerator.device
        periods = config.train.picture_every, config.evaluate.every
        draw, measure = (every and (done % every == 0 or self.is_last(done)) for every in periods)
        draw = draw or self.due.picture
        if not draw and not measure:
            return {}
        self.ema_model.to(device)
        metrics = self.validate()  # leaves the averaged weights in ema_model
        if self.monitor and measure:
            metrics |= self.monitor.measure(self.pipeline_parts(), self.source and self.source.start)
        if draw:
            self.draw_pictures(done)
        if distributed.sharded(self.accelerator):
            self.ema_model.to("cpu")
        return metrics

    def draw_pictures(self, done: int) -> None:
        """Write a grid of samples of the weights in `ema_model` to <output>/pictures, and give it to the trackers."""
        path = self.output / "pictures" / f"step-{done:06d}.png"
        images, start = self.latents.images, self.source and self.source.start
        monitor.save_picture(self.config, self.pipeline_parts(), self.conditions, images, self.accelerator, path, start)
        if self.log is not None:
            self.log.picture(done, "samples", path)

    def validation_set(self) -> dict[str, Tensor]:
        """Held-out latents x0 [N, c, h, w], with noise, t [N] and the conditioning. They are the same at every validation.

        The latents are drawn from the posteriors as in training. The times are spread evenly over those of training.
        """
        config, images, codec = self.config, self.latents.images, self.latents.codec
        pixels, labels = images.held_out_batch(config.validation_images)
        generator = torch.Generator().manual_seed(derive_seed("validation"))
        posterior = torch.Generator().manual_seed(derive_seed("validation", "posterior"))
        x0 = torch.cat([codec.latents(chunk, posterior, config.cache.use_mean).cpu() for chunk in pixels.split(128)])
        t = self.levels.midpoints(len(x0))[torch.randperm(len(x0), generator=generator)]
        texts = images.held_out_captions(config.validation_images)
        noise = randn(x0.shape, generator) if self.source is None else self.source.held_out(len(x0))
        pictures = self.conditions.held_out_pictures(images, config.validation_images)
        return {"x0": x0, "noise": noise, "t": t, **self.conditions.encode(labels, texts, "cpu", pictures)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The loss on the validation set of the raw weights (loss_raw) and of the averaged ones (loss_ema).

        It is what training minimises: weighted, corrected for the distribution of times, and balanced by the learned
        uncertainty. Where that differs from the plain squared error of the prediction, error_raw and error_ema are the
        latter. Each process computes its share. `ema_model` computes both, the averaged weights last: a sharded network
        would have to run on all processes in step.
        """
        accelerator, count, metrics = self.accelerator, len(self.validation["x0"]), {}
        names = ("loss", "error") if self.loss_is_weighted() else ("loss",)
        mine = torch.arange(count)[accelerator.process_index :: accelerator.num_processes]
        denoiser = self.denoiser_of(self.ema_model)
        for weights_name, weights in (("raw", self.trained_weights()), ("ema", self.ema.state())):
            distributed.fill(self.ema_model, weights)
            results = torch.zeros(len(names), count, device=accelerator.device)
            for rows in mine.split(128) if len(mine) else ():
                batch = {key: value[rows].to(accelerator.device) for key, value in self.validation.items()}
                x0, t, noise = (batch.pop(key) for key in ("x0", "t", "noise"))
                with accelerator.autocast():
                    error = self.errors(denoiser, Batch(x0, noise, t, batch, rows))
                results[:, rows.to(results.device)] = torch.stack([self.weighted_loss(error, t), error])[: len(names)]
            for name, mean in zip(names, accelerator.reduce(results, "sum").mean(1).tolist(), strict=True):
                metrics[f"validation/{name}_{weights_name}"] = mean
        return metrics

    def weighted_loss(self, error: Tensor, t: Tensor) -> Tensor:
        """What training minimises, [B], for squared errors of the prediction [B] at times t [B]."""
        config = self.config
        weight = loss_weight(config.weighting, config.prediction, self.schedule, t, config.min_snr_gamma)
        loss = error * weight.to(error) * self.levels.correction(t).to(error)
        return loss if self.uncertainty is None else self.uncertainty(loss, t)

    def loss_is_weighted(self) -> bool:
        """Whether what is minimised differs from the squared error of the prediction."""
        t = self.levels.midpoints(2)
        return self.config.weighting != "none" or not bool((self.levels.correction(t) == 1).all())

    # Publishing, and the training state

    def pipeline_parts(self) -> dict[str, Any]:
        """The components of a LatentDiffusionPipeline with the weights that are in `ema_model`."""
        return pipeline_parts(self.config, self.ema_model, self.schedule, self.latents, self.conditions)

    def publish(self, folder: Path, step: int, weak: tuple[nn.Module, int] | None = None) -> None:
        """Write the weights in `ema_model`, those of this step, as a pipeline's folder.

        weak: a U-Net of an earlier step, and that step, for the folder weak of the checkpoint.
        """
        source = self.source and self.source.latents.images
        save_checkpoint(self.config, self.pipeline_parts(), self.latents, self.ema.updates, folder, step, source, weak)

    def trained_weights(self) -> dict[str, Tensor]:
        """The model's weights by name; with model.lora those of the LoRA alone."""
        weights = self.model.state_dict()
        return weights if self.trained is None else {name: weights[name] for name in sorted(self.trained)}

    def state_tensors(self) -> Tensors:
        """Weights, their averages, the optimizer's moments; the learned uncertainty and the loss scale, where there are."""
        tensors = {"model": self.trained_weights(), "ema": self.ema.state()}
        tensors["optimizer"] = state.optimizer_tensors(self.optimizer)
        if self.uncertainty is not None:
            tensors["uncertainty"] = self.uncertainty.state_dict()
        if self.loss_scale.enabled:
            tensors["loss_scale"] = self.loss_scale.state()
        return tensors

    def made_from(self) -> dict[str, Any]:
        """Checksums of images, autoencoder, second images, a bridge's source and a LoRA's base; and the latents' normaliser."""
        identity, codec = self.latents.cache.manifest["identity"], self.latents.codec
        normaliser = [codec.shift.flatten().tolist(), codec.scale.flatten().tolist()]
        made_from = {"data": identity["data"], "autoencoder": identity["autoencoder"], "normaliser": normaliser}
        if self.source is not None:
            made_from["source"] = self.source.fingerprint()
        if self.conditions.image is not None:
            made_from["condition images"] = self.conditions.image.cache.manifest["identity"]["data"]
        return made_from if self.base is None else {**made_from, "base": self.base}

    @cached_property
    def base(self) -> str | None:
        """Checksum of the U-Net under a LoRA, which states do not hold; None without model.lora. It reads the whole file."""
        return None if self.trained is None else lora.base_fingerprint(self.config)

    def state_meta(self) -> dict[str, Any]:
        """Updates of the average, the precision, and the version of the validation loss."""
        return {"ema_updates": self.ema.updates, "precision": self.config.train.precision, "validation": VALIDATION}

    def load_state(self, tensors: Tensors, meta: dict[str, Any]) -> None:
        """Continue from a state. UserError where it is of another precision or another network."""
        check_state(meta, self.config, self.output)
        state.load_into(self.model, tensors["model"], str(self.output), self.trained)
        self.ema.restore(tensors["ema"], meta["ema_updates"])
        if self.uncertainty is not None:
            state.load_into(self.uncertainty, tensors["uncertainty"], str(self.output))
        state.restore_optimizer(self.optimizer, tensors["optimizer"])
        self.loss_scale.restore(tensors.get("loss_scale", {}))
        metric = self.config.train.best or ""
        if metric.startswith("validation/") and meta.get("validation") != VALIDATION and meta.get("best") is not None:
            # Beside the new numbers the old one would say that nothing improves any more, or that everything does
            meta["best"] = None
            if self.accelerator.is_main_process:
                print(
                    f"warning: {metric} was computed otherwise when this state was saved; train.best begins anew",
                    file=sys.stderr,
                )


def trial_steps(*arguments: Any) -> Step:
    """`DiffusionTrainer.trial_steps`, by the name that it had before there were two kinds of stage 2."""
    return DiffusionTrainer.trial_steps(*arguments)
