"""Stage 2 over codes: train a U-Net to restore the codes of a frozen autoencoder that were masked or replaced.

The run is that of `train_diffusion`: cache, conditions, network, averages, states and pictures are the same. `DiscreteTrainer`
says what is different: the batch, the loss, and the pipeline that is published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import DiffusionConfig, DiscreteConfig
from latentdiff.discrete import Process, add_evidence, loss, make_process
from latentdiff.errors import UserError
from latentdiff.models.code_unet import make_code_unet
from latentdiff.models.codebook import CodeUsage
from latentdiff.models.unet import check_unet
from latentdiff.pipelines.discrete_diffusion import code_logits
from latentdiff.training import conditioning, monitor
from latentdiff.training.discrete_checkpoint import discrete_parts, save_discrete
from latentdiff.training.train_diffusion import Batch, DiffusionTrainer, check_config, check_launch, run_stage
from latentdiff.utils.random import derive_seed, rand

COUNTED = 4096  # images whose codes are counted for the frequencies that a new network starts from


def train_discrete(config: DiscreteConfig, resume: bool = False, began: float | None = None) -> Path:
    """Train stage 2 over codes and return the folder of the published pipeline, <output>/model.

    Arguments, the files that are written, and errors as `train_diffusion`; config is of stage "discrete".
    """
    return run_stage(config, resume, began, check_discrete, DiscreteTrainer)


def of_stage(config: DiffusionConfig | DiscreteConfig) -> tuple[Callable[[Any], None], type[DiffusionTrainer]]:
    """(the check of a stage-2 config, the class of its trainer), for either kind of stage 2."""
    return (check_discrete, DiscreteTrainer) if isinstance(config, DiscreteConfig) else (check_config, DiffusionTrainer)


def check_discrete(config: DiscreteConfig) -> None:
    """UserError, before anything is encoded, for names and combinations that would fail only later in the run."""
    if config.condition.includes("image"):
        raise UserError(
            f"condition.type: {config.condition.type}, and stage discrete takes no second image; valid: class, text, "
            "class+text, none (known pixels need none: the published model completes images by mask_image)"
        )
    if config.sample.order == "confidence" and config.process != "absorbing":
        raise UserError("sample.order: confidence is for process absorbing, where codes once drawn stay; set it to random")
    if config.cache.use_mean:
        raise UserError("cache.use_mean: codes have no posterior to take the mean of; leave it out")
    make_process(config.process, 2, config.schedule, config.levels)
    monitor.check(config)
    conditioning.check(config)
    check_unet(config)
    check_launch(config)


class DiscreteTrainer(DiffusionTrainer):
    """The data, networks and optimizer of stage 2 over codes, and its training step.

    A batch's x0 are codes, int64 [B, L, h, w]; its noise is the seed of each sample's corruption, int64 [B].

    Attributes:
        num_codes: K, the codes of a position. K itself is the mask code.
        process: corrupts codes, and weighs the loss.
    """

    config: DiscreteConfig  # type: ignore[assignment]

    def make_process(self) -> None:
        """Make the process over the codebook's codes. Times are uniform in [0, 1]."""
        codes = self.latents.codec.num_codes
        assert codes is not None, "the autoencoder has no codebook"  # which open_inputs refuses
        self.num_codes = codes
        self.process: Process = make_process(self.config.process, codes, self.config.schedule, self.config.levels)
        self.times = 0.0, 1.0

    def make_network(self, class_rows: int | None, text_width: int | None) -> nn.Module:
        """A new U-Net. Its input has a channel for each code and the mask of each level, its output one for each code."""
        cache, codec = self.latents.cache, self.latents.codec
        levels = cache.latent_shape[0]
        counted = torch.linspace(0, len(cache) - 1, min(len(cache), COUNTED)).long()  # of every class, where they are in order
        usage = CodeUsage(self.num_codes, levels)
        usage.update(cache.codes(counted).movedim(1, -1))
        counts = usage.counts.view(levels, -1)
        shape, vectors = cache.latent_shape, codec.code_vectors()
        return make_code_unet(self.config, shape, self.num_codes, class_rows, text_width, vectors, counts)

    def denoiser_of(self, network: nn.Module) -> Any:
        """predict(codes, t, **conditioning) -> logits [B, L, h, w, K] of the codes before corruption."""

        def predict(codes: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
            return code_logits(network, codes, t, self.num_codes, **conditioning)

        return add_evidence(predict, self.process)

    def losses(self, piece: Batch) -> Tensor:
        """The loss of each sample of a piece, [B], in nats per position."""
        return self.errors(self.denoiser, piece)

    def errors(self, denoiser: Any, piece: Batch) -> Tensor:
        """The loss of a network for each sample, [B], in nats per position; denoiser: from `denoiser_of`."""
        draws = [torch.Generator().manual_seed(seed) for seed in piece.noise.tolist()]
        return loss(denoiser, piece.x0, self.process, piece.t, draws, self.config.weighting, **piece.conditioning)

    def weighted_loss(self, error: Tensor, t: Tensor) -> Tensor:
        """What training minimises: the error as it is, [B]."""
        return error

    def loss_is_weighted(self) -> bool:
        """Never: what is minimised is the error."""
        return False

    def draw_batch(self, step: int) -> Batch:
        """This process's share of a step's batch; as in `DiffusionTrainer.draw_batch`."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        size, local = config.train.batch_size, config.train.batch_size // world
        mine = slice(rank * local, (rank + 1) * local)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "step", step))
        t = spread_times(size, generator)[mine]
        draws = {name: values[mine] for name, values in self.conditions.draw(size, generator).items()}
        indices, flips = self.image_indices(step)[mine], self.image_flips(step, mine)
        codes = self.latents.cache.codes(indices, flips)
        conditioning = self.conditions(indices, draws, self.accelerator.device, flips)
        return Batch(codes, corruption_seeds(size, generator)[mine], t, conditioning, torch.arange(size)[mine])

    def validation_set(self) -> dict[str, Tensor]:
        """Codes of held-out images, times spread evenly, what corrupts them, and the conditioning: always the same."""
        config, images = self.config, self.latents.images
        pixels, labels = images.held_out_batch(config.validation_images)
        codes = torch.cat([self.latents.codec.codes(chunk).cpu() for chunk in pixels.split(128)])
        generator = torch.Generator().manual_seed(derive_seed("validation"))
        t = spread_times(len(codes), generator)[torch.randperm(len(codes), generator=generator)]
        seeds = corruption_seeds(len(codes), generator)
        conditioning = self.conditions.encode(labels, images.held_out_captions(config.validation_images), "cpu")
        return {"x0": codes, "noise": seeds, "t": t, **conditioning}

    def pipeline_parts(self) -> dict[str, Any]:
        """The components of a DiscreteDiffusionPipeline with the weights that are in `ema_model`."""
        return discrete_parts(self.config, self.ema_model, self.latents, self.conditions)

    def publish(self, folder: Path, step: int) -> None:
        """Write the weights in `ema_model`, those of this step, as a pipeline's folder."""
        save_discrete(self.config, self.pipeline_parts(), self.latents, self.ema.updates, folder, step)

    def made_from(self) -> dict[str, Any]:
        """Checksums of the images and the autoencoder."""
        identity = self.latents.cache.manifest["identity"]
        return {"data": identity["data"], "autoencoder": identity["autoencoder"]}


def spread_times(count: int, generator: torch.Generator) -> Tensor:
    """Times spread evenly over (0, 1] with one random offset, float64 [count]; each is uniform (VDM, arXiv 2107.00630, I.1)."""
    return 1 - (rand((1,), generator, dtype=torch.float64) + torch.arange(count, dtype=torch.float64) / count) % 1.0


def corruption_seeds(count: int, generator: torch.Generator) -> Tensor:
    """Seeds of the generators that corrupt the codes of `count` samples, int64 [count]."""
    return torch.randint(2**62, (count,), generator=generator)
