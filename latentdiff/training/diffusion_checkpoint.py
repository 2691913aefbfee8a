"""Stage 2's network as a pipeline: pictures drawn while it trains, and the checkpoint that is published at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff import checkpoints, samplers
from latentdiff.config import DiffusionConfig
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.training import conditioning
from latentdiff.training.latents import Latents
from latentdiff.utils.random import generators

PROMPTS = 8  # that a picture shows while training, where the config names none


def published_scheduler(config: DiffusionConfig, schedule: NoiseSchedule) -> Any:
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


def pipeline_parts(
    config: DiffusionConfig,
    network: nn.Module,
    schedule: NoiseSchedule,
    latents: Latents,
    conditions: conditioning.Conditions,
) -> dict[str, Any]:
    """Keyword arguments of a LatentDiffusionPipeline with the weights of `network`: its components and its config.

    network: the U-Net, or the U-Net with the text encoder that was trained with it.
    """
    scheduler = published_scheduler(config, schedule)
    return {
        **conditioning.pipeline_pieces(network, conditions, latents.images.class_names),
        "vae": latents.codec.vae,
        "scheduler": scheduler,
        "default_sampler": (config.sample.sampler or "dpmpp_2m") if scheduler is None else None,
        "image_size": latents.images.preprocess.content[2:],
        "prediction": config.prediction,
        "schedule": {"name": config.schedule.name, **config.schedule.params},
    }


@torch.no_grad()
def save_picture(
    config: DiffusionConfig, parts: dict[str, Any], conditions: conditioning.Conditions, accelerator: Any, path: Path
) -> None:
    """Write a grid of samples, one row per class or prompt, drawn from fixed seeds.

    parts: what `pipeline_parts` gave. Every process calls it and draws its share of the rows; the main one writes.
    """
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.utils.images import save_rows

    # As a default the scale is off where neither class nor prompt says anything; given in the call it would be refused
    pipeline = LatentDiffusionPipeline(**parts, default_guidance_scale=conditioning.guidance_scale(config))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.refuse_non_finite = False  # training judges by its loss, and goes on
    classes: list[int | None] = list(range(min(10, pipeline.num_classes))) or [None] * PROMPTS
    prompts: list[str] | None = None
    if conditions.text:
        prompts = config.sample.prompts or conditions.example_captions(classes)
        classes = [classes[k % len(classes)] for k in range(len(prompts))]
    rows, world, each = len(classes), accelerator.num_processes, config.sample.per_class
    share = -(-rows // world)
    # Every process draws as many rows, the last ones some a second time, so that they can be gathered
    mine = [k % rows for k in range(accelerator.process_index * share, (accelerator.process_index + 1) * share)]
    images = pipeline(
        prompt=None if prompts is None else [prompts[k] for k in mine],
        class_labels=[classes[k] for k in mine],
        num_images_per_label=each,
        guidance_interval=config.sample.guidance_interval,
        num_inference_steps=config.sample.steps,
        generator=generators(config.seed, [k * each + i for k in mine for i in range(each)]),
        output_type="pt",
    ).images
    if world > 1:
        images = accelerator.gather(images.contiguous())[: rows * each]
    if accelerator.is_main_process:
        save_rows(list((images.cpu() * 2 - 1).split(each)), path)


def save_checkpoint(
    config: DiffusionConfig, parts: dict[str, Any], latents: Latents, ema_updates: int, folder: Path, step: int
) -> None:
    """Write a pipeline as a diffusers folder, with a record of how it was made.

    Args:
        config: the run's config.
        parts: what `pipeline_parts` gave; its weights are the averaged ones.
        latents: the latent cache that the run trained on.
        ema_updates: how many steps the average is over.
        folder: the folder to write; what a killed run left there is replaced.
        step: how many steps the weights were trained for.
    """
    cache = latents.cache
    statistics = cache.statistics()
    meta = {
        "config": config.model_dump(mode="json"),
        "steps": step,
        "ema": {"decay": config.ema.decay, "power": config.ema.power, "updates": ema_updates},
        "data": {"source": config.data.source, "images": len(cache), "fingerprint": latents.images.train.fingerprint()},
        "autoencoder": {"fingerprint": latents.codec.fingerprint()},
        "latents": {
            "shape": list(cache.latent_shape),
            "mean": statistics.mean.tolist(),
            "std": statistics.std.tolist(),
            "posterior_share": statistics.posterior_share.tolist(),
        },
    }
    checkpoints.save(
        folder,
        **parts,
        meta=meta,
        default_guidance_scale=conditioning.guidance_scale(config),
        default_guidance_interval=config.sample.guidance_interval,
        default_num_inference_steps=config.sample.steps,
    )
