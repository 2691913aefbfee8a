"""Stage 1: train an AutoencoderKL, or a VQModel or its kin, for reconstruction, then freeze it with its latents measured.

`train_autoencoder` sets a run up. `AutoencoderTrainer.update` is one training step; `trainer.Trainer.run` repeats it.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import AutoencoderConfig, CodebookConfig
from latentdiff.data.shuffling import stream
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import TRAINABLE, build_autoencoder, load_autoencoder, with_codes
from latentdiff.models.codebook import EMBEDDING, CodebookEma, CodeUsage, codebooks, is_trained, revive
from latentdiff.models.codec import LatentCodec
from latentdiff.models.discriminator import PatchDiscriminator
from latentdiff.training import messages, run_clock, state
from latentdiff.training.accelerator import announcement, start_accelerator
from latentdiff.training.autoencoder_checkpoint import save_autoencoder, save_reconstructions
from latentdiff.training.autoencoder_loss import ADAPTIVE_MAX, discriminator_terms, likeness_and_adversarial, stage1_terms
from latentdiff.training.compile import compile_checked
from latentdiff.training.ema import Ema
from latentdiff.training.images import Images
from latentdiff.training.logging import RunLogger, Values
from latentdiff.training.micro_batch import find_micro_batch
from latentdiff.training.optimizer import clip_gradient, make_optimizer, set_learning_rate
from latentdiff.training.precision import OneProcess, Step, check_state, named, resolve
from latentdiff.training.run_folder import locked_run_folder, write_config
from latentdiff.training.trainer import Tensors, Trainer, accumulating, micro_batches
from latentdiff.utils.random import derive_seed, randn
from latentdiff.utils.tensors import widen

Means = dict[str, tuple[Tensor, int]]  # name -> (mean over samples, how many samples)


def train_autoencoder(config: AutoencoderConfig, resume: bool = False, began: float | None = None) -> Path:
    """Train stage 1 and return the folder of the finished autoencoder, <output>/autoencoder.

    Also written: run.json (the config), metrics.jsonl, logs/ (TensorBoard), pictures/, state/, report.json and report.png.

    Args:
        config: of stage "autoencoder".
        resume: continue the run in config.output from its newest training state.
        began: when the run was called, by `run_clock.now`; None: now. Its minutes count from then.

    Raises:
        UserError: a mistake in the config, the data or the output folder. Nothing was written then.
    """
    began = run_clock.now() if began is None else began
    output = Path(config.output)
    accelerator = start_accelerator(config.train)
    with locked_run_folder(output, config, resume) as resumes:
        _train(config, resumes, accelerator, began)
    return output / "autoencoder"


def _train(config: AutoencoderConfig, resume: bool, accelerator: Any, began: float) -> None:
    output = Path(config.output)

    # 1. The network and the images. Their sides are padded to multiples of the network's factor.
    torch.manual_seed(derive_seed(config.seed, "initialise"))
    vae = make_autoencoder(config)
    images = Images(config.data, LatentCodec(vae).factor)

    # 2. Precision and micro-batch, where the config says auto: measured by a few steps on random images.
    trial = partial(trial_steps, config, vae, (config.data.channels, *images.preprocess.padded_size))
    config, precision = resolve(config, output, accelerator, trial, resume)
    config = find_micro_batch(config, accelerator, trial)
    accelerator = start_accelerator(config.train)  # again: now in the precision that was chosen

    # 3. Optimizer, discriminator and averaged weights; then the state of the run that is resumed, or a codebook from data.
    trainer = AutoencoderTrainer(config, vae, images, accelerator)
    trainer.clock.began = began  # what came before counts too: measuring the precision, say
    if config.train.compile:
        trainer.compile()
    if resume:
        trainer.resume()
    elif config.codebook.start == "data":
        trainer.start_codebook()

    # 4. Print what the run has, record the config, then train.
    warnings = [*messages.length_warnings(config), *messages.data_warnings(config, len(images.train))]
    announcement(accelerator, config.train, precision, lines=messages.as_warnings(warnings))()
    images.print_report()
    if accelerator.is_main_process:
        write_config(output, config, resume)
        messages.print_lines([messages.where_results_appear(config)])
    steps, clock = config.train.steps, trainer.clock
    with RunLogger(output, steps, trainer.progress.step, accelerator, config.train.trackers, clock) as log:
        trainer.run(log)

    # 5. Publish the averaged weights.
    trainer.ema.copy_to(vae)
    meta = {"steps": trainer.progress.step, **trainer.state_meta()}
    save_autoencoder(config, images, vae, accelerator, output / "autoencoder", meta)
    accelerator.wait_for_everyone()


def trial_steps(config: AutoencoderConfig, vae: nn.Module, shape: tuple[int, int, int], alone: OneProcess) -> Step:
    """step(precision, batch): training steps of a copy of the autoencoder on random images [C, H, W], to be timed.

    They are with the discriminator where it takes part in more than half of the run.
    """
    trainer = AutoencoderTrainer(config, copy.deepcopy(vae), None, alone)
    start = config.loss.adversarial_start
    number = start if config.loss.adversarial > 0 and 2 * start < config.train.steps else 0

    def step(precision: str, batch: int) -> None:
        alone.precision = precision
        trainer.config = named(config, precision, batch)
        trainer.update(torch.rand(batch, *shape, device=alone.device) * 2 - 1, number, config.optimizer.lr)

    return step


def make_autoencoder(config: AutoencoderConfig) -> nn.Module:
    """The autoencoder that a config trains: a new one, model.pretrained, or one with codes made of that AutoencoderKL.

    Raises:
        UserError: the config names none, or a pretrained one of another kind or with other channels or sizes.
    """
    if config.model.pretrained is not None:
        vae = load_autoencoder(config.model.pretrained)
        if type(vae).__name__ not in TRAINABLE or vae.config.in_channels != config.data.channels:
            raise UserError(
                f"model.pretrained {config.model.pretrained}: is {type(vae).__name__} for {vae.config.in_channels} channels; "
                f"stage 1 trains {' or '.join(TRAINABLE)} with data.channels={config.data.channels}"
            )
        made = type(vae).__name__ == "AutoencoderKL" and config.model.type in TRAINABLE[1:]
        if made:
            vae = with_codes(vae, str(config.model.type), config.model.config)
            if is_trained(vae) and (config.freeze_encoder or config.codebook.start != "data"):
                raise UserError(
                    f"codebook.start: model.pretrained {config.model.pretrained} has no codebook, so set it to data, and leave "
                    "freeze_encoder out"
                )
        if config.latent_noise and (not config.freeze_encoder or hasattr(vae, "quantize")):
            raise UserError("latent_noise: is for the decoder of an AutoencoderKL alone; set freeze_encoder, or leave it out")
        _check_codebook(config, vae, made)
        return vae
    if config.freeze_encoder:
        raise UserError("freeze_encoder: needs model.pretrained, an autoencoder whose encoder is trained")
    if config.latent_noise:
        raise UserError("latent_noise: needs model.pretrained and freeze_encoder, as it follows the scale of finished latents")
    if config.model.type is None:
        raise UserError(f"model: set type ({', '.join(TRAINABLE[:-1])} or {TRAINABLE[-1]}) with config, or pretrained")
    vae = build_autoencoder(config.model.type, config.model.config, config.data.channels, config.initial_logvar)
    _check_codebook(config, vae, True)
    return vae


def _check_codebook(config: AutoencoderConfig, vae: nn.Module, is_new: bool) -> None:
    """UserError where a key of the config's `codebook` has no effect, such as where nothing is trained in it."""
    if config.codebook == CodebookConfig():
        return
    if config.freeze_encoder or not is_trained(vae):
        reason = "freeze_encoder keeps it as it is" if config.freeze_encoder else f"{type(vae).__name__} has none to train"
        raise UserError(f"codebook: is for a VQModel or ResidualVQModel whose codebook is trained, and {reason}; leave it out")
    if not is_new and config.codebook.start != "random":
        raise UserError("codebook.start: model.pretrained has a codebook already; leave it out")
    if config.codebook.update != "ema" and config.codebook.decay != CodebookConfig().decay:
        raise UserError("codebook.decay: is of the running means; set codebook.update=ema, or leave it out")


class EncoderDecoder(nn.Module):
    """The whole reconstruction as one forward pass, so that DDP averages the gradients of encoder and decoder together.

    vae: the autoencoder. scale: of its normaliser, as of `LatentCodec`, [c] or [1].
    """

    def __init__(self, vae: nn.Module, scale: Tensor):
        super().__init__()
        self.vae = vae
        self.discrete = hasattr(vae, "quantize")
        if self.discrete:
            # |sg(z) - e|^2 + beta |z - sg(e)|^2, VQ-VAE (arXiv:1711.00937) eq. 3, beta 0.25. Diffusers' default, kept for
            # old weights, has beta on the first term, which is the codebook's
            vae.quantize.legacy = False
        self.register_buffer("latent_std", (1 / scale)[:, None, None], persistent=False)  # [c or 1, 1, 1]

    def forward(self, images: Tensor, noise: Tensor | None = None, level: Tensor | None = None) -> dict[str, Tensor]:
        """The reconstruction [B, C, H, W] of images [B, C, H, W], and what the loss needs of the latents.

        Of an AutoencoderKL: the posterior's mean and logvar; noise [B, c, h, w] draws from it. level [B] makes the draw wider
        for the decoder, by so many standard deviations of the latents. Of a VQModel, which takes neither: commitment (a
        scalar), codes [n] (of L levels [n, L]) and the latents [B, c, h, w] before quantisation. An FSQModel has no commitment.
        """
        if self.discrete:
            latents = self.vae.encode(images).latents
            quantised, commitment, (_, _, codes) = self.vae.quantize(latents.float())
            image = self.vae.decode(quantised, force_not_quantize=True).sample
            output = {"reconstruction": image, "codes": codes, "latents": latents}
            if not is_trained(self.vae):
                return output
            if not self.vae.quantize.embedding.weight.requires_grad:
                # Both terms have the same value, and only beta |z - sg(e)|^2 is minimised: running means move the codebook
                commitment = commitment - commitment.detach() / (1 + self.vae.quantize.beta)
            return {**output, "commitment": commitment}
        posterior = self.vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        std = torch.exp(0.5 * logvar)
        if level is not None:
            std = torch.hypot(std, widen(level, mean) * self.latent_std.to(mean))  # variances add
        z = mean + std * noise
        return {"reconstruction": self.vae.decode(z).sample, "mean": mean, "logvar": logvar}


class AutoencoderTrainer(Trainer):
    """Stage 1's data, networks and optimizers, and its training step.

    Attributes:
        images: the training and held-out images; None while steps are timed on random ones.
        model: the autoencoder `model.vae` with its reconstruction as one forward pass.
        parallel_model: `model` as accelerate wraps it (DDP); what a training step calls.
        ema: running averages of the autoencoder's weights.
        perceptual: the network of the perceptual term, frozen, or None.
        discriminator: the patch discriminator, or None.
        parallel_discriminator: `discriminator` as accelerate wraps it.
        code_usage: of a VQModel, how often each code was used in this epoch, over all processes.
        codebook_ema: of a VQModel with codebook.update=ema, the running means that are its codebook.
        last_latents: of a VQModel, the last batch's latents, from which unused codes are revived.
    """

    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig, vae: nn.Module, images: Images | None, accelerator: Any):
        super().__init__(config, accelerator)
        loss = config.loss
        if config.train.compile and loss.adversarial > 0 and loss.adaptive:
            raise UserError("train.compile: a compiled decoder cannot weigh the adversary; set it or loss.adaptive to false")
        if not (loss.l1 or loss.l2 or loss.perceptual):
            raise UserError("loss: one of l1, l2 and perceptual must be above 0")
        self.images = images
        self._batches: Any = None
        codec = LatentCodec(vae)  # freezes the network
        self.factor = codec.factor  # image sides over latent sides

        # What is trained: everything, or whatever comes after the latents
        vae.train().requires_grad_(True)
        frozen = ("encoder", "quant_conv", "quantize") if config.freeze_encoder else ()
        for name in frozen:
            if getattr(vae, name, None) is not None:
                getattr(vae, name).requires_grad_(False)
        self.model = EncoderDecoder(vae, codec.scale)
        by_means = config.codebook.update == "ema"
        if self.model.discrete and (by_means or loss.commitment == 0 or not is_trained(vae)):
            vae.quantize.requires_grad_(False)  # no term reaches the codebook, and DDP waits for every gradient
        if config.train.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.optimizer: Any = make_optimizer(self.model.parameters(), config.optimizer)

        # What the loss needs: the discriminator, the perceptual network
        self.discriminator: nn.Module | None = None
        self.parallel_discriminator: nn.Module | None = None
        self.discriminator_optimizer: Any = None
        if loss.adversarial > 0:
            widths = [loss.discriminator_channels * 2**i for i in range(loss.discriminator_layers + 1)]
            self.discriminator = PatchDiscriminator(config.data.channels, widths)
            # Betas as in VQGAN (arXiv:2012.09841); eps is the autoencoder's
            settings = {"lr": loss.discriminator_lr, "betas": (0.5, 0.9), "weight_decay": 0.0}
            optimizer_config = config.optimizer.model_copy(update=settings)
            self.discriminator_optimizer = make_optimizer(self.discriminator.parameters(), optimizer_config)
        self.perceptual = None
        if loss.perceptual > 0:
            self.perceptual = _load_perceptual(loss.perceptual_network).to(accelerator.device)

        # Several processes, averaged weights, usage of the codes
        self.parallel_model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        if self.discriminator is not None:
            prepared = accelerator.prepare(self.discriminator, self.discriminator_optimizer)
            self.parallel_discriminator, self.discriminator_optimizer = prepared
        self.ema = Ema(vae, config.ema.decay, config.ema.power)
        self.code_usage: CodeUsage | None = None
        self.codebook_ema: CodebookEma | None = None
        self.last_latents: Tensor | None = None
        if (books := codebooks(vae)) is not None:
            self.code_usage = CodeUsage(books.shape[1], books.shape[0])
            if by_means:
                self.codebook_ema = CodebookEma(vae, config.codebook.decay)
                self.ema.frozen.discard(EMBEDDING)  # no gradient reaches it, and yet it moves

    # A training step

    def train_step(self, step: int, lr: float) -> tuple[Values, bool]:
        """One update of the weights; see `Trainer.train_step`."""
        return self.update(self.read_images(step), step, lr)

    def update(self, images: Tensor, step: int, lr: float) -> tuple[Means, bool]:
        """One update of the autoencoder on images [B, C, H, W] in [-1, 1], and of the discriminator once it takes part.

        Returns (means for the log, whether every gradient was finite). Where one was not, neither network is changed.
        """
        config, count = self.config, len(images)
        set_learning_rate(self.optimizer, lr)
        inputs = (images, *self.draw_noise(images, step))
        pieces = [
            tuple(part if part is None else part[rows] for part in inputs)
            for rows in micro_batches(count, config.train.micro_batch)
        ]
        # The adversarial term's weight follows from gradients of the whole batch. In pieces it is computed ahead of them.
        adaptive_weight = self._adaptive_weight(pieces, step) if len(pieces) > 1 else None

        # The autoencoder's gradient. Those of the pieces (train.micro_batch) add up to the batch's.
        values: Means = {}
        reconstructions, outputs = [], []
        for k, (x, *noise) in enumerate(pieces):
            with accumulating([self.parallel_model], last=k + 1 == len(pieces)):
                output = self.parallel_model(x, *noise)
                terms = self.loss_terms(x, output, step, adaptive_weight)
                self.accelerator.backward(self.loss_scale.scaled(terms["total"] * (len(x) / count)))
            reconstructions.append(output["reconstruction"].detach().float())
            outputs.append({name: output[name].detach() for name in ("codes", "latents") if name in output})
            _add_means(values, terms, len(x))
        self.loss_scale.unscale(self.optimizer)
        norm = clip_gradient(self.model, config.optimizer.clip)
        values |= {**self.loss_scale.logged(), "gradient_norm": (torch.tensor(norm), 1)}
        finite, optimizers = math.isfinite(norm), [self.optimizer]

        # The discriminator's gradient, on the same reconstructions: it is computed before either network moves.
        if finite and self.discriminator is not None and self.config.loss.adversarial_at(step):
            finite = math.isfinite(self._discriminator_gradient(images, reconstructions, values))
            optimizers.append(self.discriminator_optimizer)

        # Update both networks and the average, unless a gradient is not finite.
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if finite:
            self.loss_scale.stepped()
            if self.code_usage is not None:
                codes = torch.cat([output["codes"] for output in outputs])
                self.last_latents = torch.cat([output["latents"] for output in outputs])
                self.code_usage.update(self.accelerator.gather(codes))
                if self.codebook_ema is not None:
                    self.codebook_ema.update(self.model.vae, self.last_latents, codes, partial(_sum_over, self.accelerator))
            self.ema.update(self.model.vae)
        return values, finite

    def read_images(self, step: int) -> Tensor:
        """This process's images of a step's batch, [B, C, H, W] on its device. The batches after it are read ahead."""
        assert self.images is not None
        size = self.config.train.batch_size
        if self._batches is None or self._batches.position != step * size:  # at the first step, and after a roll-back
            self.stop_reading()
            self._batches = self.images.batches(self.config.seed, size, step, self.accelerator)
        return next(self._batches)[0].to(self.accelerator.device)

    def stop_reading(self) -> None:
        """End the processes that read images ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def image_indices(self, step: int) -> Tensor:
        """The training images of a step's global batch, int64 [batch_size]."""
        assert self.images is not None
        size, images = self.config.train.batch_size, self.images.samples
        return stream(len(images), self.config.seed, step * size, size, images.blocks)

    def draw_noise(self, images: Tensor, step: int) -> tuple[Tensor | None, Tensor | None]:
        """(noise [B, c, h, w], level [B]) of `EncoderDecoder` at a step: this process's rows of what the global batch draws.

        The levels are |N(0, latent_noise^2)|, one for each image, as in RAE (arXiv 2510.11690, noise-augmented decoding); None
        without latent_noise. Both are None for a VQModel, which has no posterior.
        """
        if self.model.discrete:
            return None, None
        sides = (side // self.factor for side in images.shape[2:])
        shape = (self.config.train.batch_size, self.model.vae.config.latent_channels, *sides)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "posterior", step))
        first = self.accelerator.process_index * len(images)
        own = slice(first, first + len(images))
        noise, level = randn(shape, generator)[own].to(images.device), None
        if self.config.latent_noise:
            generator.manual_seed(derive_seed(self.config.seed, "latent noise", step))
            level = self.config.latent_noise * randn(shape[:1], generator)[own].abs().to(images.device)
        return noise, level

    def loss_terms(self, images: Tensor, output: dict[str, Tensor], step: int, adaptive_weight: Any) -> dict[str, Tensor]:
        """The loss's terms and their `total`; see `autoencoder_loss.stage1_terms`. output: what `EncoderDecoder` gave."""

        def mean_over_processes(value: Tensor) -> Tensor:
            return self.accelerator.reduce(value, "mean")

        with self.accelerator.autocast():
            return stage1_terms(
                images,
                output["reconstruction"].float(),
                self.config.loss,
                step,
                moments=None if self.model.discrete else (output["mean"], output["logvar"]),
                commitment=output.get("commitment"),
                perceptual=self.perceptual,
                discriminator=self.discriminator,
                last_layer=self.model.vae.decoder.conv_out.weight,
                reduce=mean_over_processes if self.accelerator.num_processes > 1 else None,
                factor=adaptive_weight,
                scale=self.loss_scale.factor(),
            )

    def _adaptive_weight(self, pieces: list[tuple[Any, ...]], step: int) -> Tensor | None:
        """The adversarial term's weight for a batch in pieces, or None where there is none.

        It compares gradients of the whole batch at the last layer, before the first backward pass. So the pieces go through
        the network once more.
        """
        weights, last_layer = self.config.loss, self.model.vae.decoder.conv_out.weight
        if self.discriminator is None or not weights.adversarial_at(step) or not weights.adaptive:
            return None
        total = sum(len(x) for x, *_ in pieces)
        gradients = [torch.zeros_like(last_layer), torch.zeros_like(last_layer)]
        with accumulating([self.parallel_model], last=False):
            for x, *noise in pieces:
                reconstruction = self.parallel_model(x, *noise)["reconstruction"].float()
                with self.accelerator.autocast():
                    both = likeness_and_adversarial(x, reconstruction, weights, self.discriminator, self.perceptual)
                scale = self.loss_scale.factor()
                for k, loss in enumerate(both):
                    (gradient,) = torch.autograd.grad(loss * scale, last_layer, retain_graph=k == 0)
                    gradients[k] += gradient * (len(x) / total / scale)
        likeness, adversarial = (self.accelerator.reduce(gradient, "mean").norm() for gradient in gradients)
        return (likeness / (adversarial + 1e-6)).clamp(0.0, ADAPTIVE_MAX)

    def _discriminator_gradient(self, images: Tensor, reconstructions: list[Tensor], values: Means) -> float:
        """The norm of the discriminator's gradient on images and their reconstructions; the gradient is left clipped."""
        assert self.discriminator is not None and self.parallel_discriminator is not None
        reals = images.split([len(fake) for fake in reconstructions])
        for k, (real, fake) in enumerate(zip(reals, reconstructions, strict=True)):
            with accumulating([self.parallel_discriminator], last=k + 1 == len(reals)):
                with self.accelerator.autocast():
                    terms = discriminator_terms(self.parallel_discriminator, real, fake)
                self.accelerator.backward(self.loss_scale.scaled(terms["total"] * (len(real) / len(images))))
            _add_means(values, {f"discriminator_{name}": value for name, value in terms.items()}, len(real))
        self.loss_scale.unscale(self.discriminator_optimizer)
        return clip_gradient(self.discriminator, self.config.optimizer.clip)

    def compile(self) -> None:
        """Compile encoder and decoder. UserError where they then compute something else, on the first step's batch."""
        x = self.read_images(0)
        self.stop_reading()
        rows = micro_batches(len(x), self.config.train.micro_batch)[0]
        inputs, vae = (x, *self.draw_noise(x, 0)), self.model.vae
        x, *noise = (part if part is None else part[rows] for part in inputs)

        def loss() -> Tensor:
            with self.accelerator.autocast():
                out = self.model(x, *noise)
                if self.model.discrete:
                    extra = out.get("commitment", out["latents"].square().mean()).float()
                else:
                    extra = out["mean"].square().mean() + out["logvar"].mean()
                return (out["reconstruction"].float() - x).square().mean() + 1e-3 * extra

        compile_checked(self.model, [vae.encoder, vae.decoder], loss, self.config.train.precision)

    # After a step

    def after_step(self, done: int) -> dict[str, float]:
        """At the end of an epoch, the usage of a VQModel's codes; a picture of reconstructions where it is due."""
        assert self.images is not None
        train, metrics = self.config.train, {}
        counted = self.config.codebook.revive_every or max(1, len(self.images.train) // train.batch_size)
        if self.code_usage is not None and done % counted == 0:
            metrics = self._end_of_epoch(done - 1)
            self.code_usage.reset()
        if (done % train.picture_every == 0 or self.due.picture) and self.accelerator.is_main_process:
            path = self.output / "pictures" / f"step-{done:06d}.png"
            save_reconstructions(self.model.vae, self.images, path)
            if self.log is not None:
                self.log.picture(done, "reconstructions", path)
        if self.is_last(done):
            self.stop_reading()
        return metrics

    @torch.no_grad()
    def start_codebook(self) -> None:
        """Put latents of the first batch into the codebook, before the first step."""
        x = self.read_images(0)
        self.stop_reading()
        vae = self.model.vae
        with self.accelerator.autocast():
            pieces = [vae.encode(x[rows]).latents for rows in micro_batches(len(x), self.config.train.micro_batch)]
        assert self.code_usage is not None
        self._revive(torch.zeros_like(self.code_usage.counts), torch.cat(pieces), "start", publish=True)

    def _end_of_epoch(self, step: int) -> dict[str, float]:
        """Revive the codes that were not used in this epoch; returns how much of the codebook was used, and revived."""
        usage = self.code_usage
        assert usage is not None
        values = {"codes/used": usage.usage(), "codes/perplexity": usage.perplexity(), "codes/revived": 0.0}
        trained = is_trained(self.model.vae) and not self.config.freeze_encoder
        if self.config.revive_dead_codes and trained and self.last_latents is not None:
            last = self.is_last(step + 1)  # then no step is left to train new codes in, so they are not published
            values["codes/revived"] = float(self._revive(usage.counts, self.last_latents, "revive", step, publish=not last))
        return values

    def _revive(self, counts: Tensor, latents: Tensor, *seed: str | int, publish: bool) -> int:
        """Put random latents in the place of codes that were not used, and return how many these were.

        What is kept of the old rows is dropped: the optimizer's moments, the running means, and where `publish` is true the
        averaged weights. latents: this process's.
        """
        # Every process draws the same codes from the same latents, so the codebooks stay equal
        latents = self.accelerator.gather(latents.float().contiguous())
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, *seed))
        vae = self.model.vae
        rows = revive(vae, counts, latents, generator)
        weight = vae.quantize.embedding.weight
        for name, moment in self.optimizer.state.get(weight, {}).items():
            if name != "step":  # which is of the whole codebook
                moment[rows] = 0.0
        if self.codebook_ema is not None:
            self.codebook_ema.restart(vae, rows)
        if publish:
            self.ema.average[EMBEDDING][rows] = weight.detach()[rows]
        return len(rows)

    # The training state

    def state_tensors(self) -> Tensors:
        """Weights, their averages, the optimizers' moments, the usage of codes and the loss scale, where there are."""
        # The order of the data and all noise follow from (seed, step), so there is nothing to keep of them
        tensors = {"model": self.model.vae.state_dict(), "ema": self.ema.state()}
        tensors["optimizer"] = state.optimizer_tensors(self.optimizer)
        if self.discriminator is not None:
            tensors["discriminator"] = self.discriminator.state_dict()
            tensors["discriminator_optimizer"] = state.optimizer_tensors(self.discriminator_optimizer)
        if self.code_usage is not None:
            tensors["codes"] = {"counts": self.code_usage.counts}
            if self.codebook_ema is not None:
                tensors["codes"] |= self.codebook_ema.state()
        if self.loss_scale.enabled:
            tensors["loss_scale"] = self.loss_scale.state()
        return tensors

    def state_meta(self) -> dict[str, Any]:
        """Updates of the average, and the precision."""
        return {"ema_updates": self.ema.updates, "precision": self.config.train.precision}

    def made_from(self) -> dict[str, Any]:
        """A checksum of the images."""
        assert self.images is not None
        return {"data": self.images.train.fingerprint()}

    def load_state(self, tensors: Tensors, meta: dict[str, Any]) -> None:
        """Continue from a state. UserError where it is of another precision or another network."""
        check_state(meta, self.config, self.output)
        state.load_into(self.model.vae, tensors["model"], str(self.output))
        self.ema.restore(tensors["ema"], meta["ema_updates"])
        state.restore_optimizer(self.optimizer, tensors["optimizer"])
        if self.discriminator is not None:
            state.load_into(self.discriminator, tensors["discriminator"], str(self.output))
            state.restore_optimizer(self.discriminator_optimizer, tensors.get("discriminator_optimizer", {}))
        if self.code_usage is not None:
            self.code_usage.counts.copy_(tensors["codes"]["counts"])
            if self.codebook_ema is not None:
                self.codebook_ema.restore(tensors["codes"])
        self.loss_scale.restore(tensors.get("loss_scale", {}))


def _load_perceptual(network: str | None) -> nn.Module:
    """The network that loss.perceptual_network names. UserError where it names none."""
    from latentdiff.models.perceptual import Lpips, Perceptual

    if network is None:
        raise UserError("loss.perceptual_network: name a feature network's folder (or lpips), or set loss.perceptual=0")
    if network == "lpips":
        return Lpips()
    from latentdiff.checkpoints import resolve_model
    from latentdiff.models.feature_net import load_features

    return Perceptual(load_features(resolve_model(network)))


def _sum_over(accelerator: Any, tensor: Tensor) -> Tensor:
    """A tensor summed over the processes."""
    return accelerator.reduce(tensor, "sum")


def _add_means(values: Means, terms: dict[str, Tensor], count: int) -> None:
    """Add the means over one piece's `count` samples to those of the batch so far."""
    for name, term in terms.items():
        mean, before = values.get(name, (torch.zeros_like(term.detach()), 0))
        values[name] = ((mean * before + term.detach() * count) / (before + count), before + count)
