"""Stage 2's network as a pipeline, and the checkpoint that a run publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from latentdiff import checkpoints, samplers
from latentdiff.config import DiffusionConfig, DiscreteConfig
from latentdiff.errors import UserError
from latentdiff.models.text_encoder import NULL_PROMPT, UNetWithTextEncoder
from latentdiff.schedules import NoiseSchedule
from latentdiff.training import lora
from latentdiff.training.conditioning import Conditions, guidance_scale
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents


def published_scheduler(config: DiffusionConfig, schedule: NoiseSchedule) -> Any:
    """The diffusers scheduler of the checkpoint; None where the checkpoint names one of latentdiff's samplers instead.

    UserError where the schedule or the prediction has no scheduler of that name, or latentdiff has no such sampler.
    """
    sample = config.sample
    name = schedule.default_scheduler if sample.scheduler == "auto" else sample.scheduler
    if name is not None:
        if sample.sampler is not None:
            raise UserError(f"sample.sampler: {sample.sampler} would not run beside a scheduler; set sample.scheduler=null")
        return schedule.to_scheduler(name, config.prediction, **sample.scheduler_config)
    if sample.scheduler_config:
        raise UserError(f"sample.scheduler_config: {config.schedule.name} runs without a scheduler; leave it out")
    if sample.sampler not in (None, *samplers.names()):
        raise UserError(f"sample.sampler: {sample.sampler!r} is unknown; valid: {', '.join(samplers.names())}")
    return None


def pipeline_parts(
    config: DiffusionConfig, network: nn.Module, schedule: NoiseSchedule, latents: Latents, conditions: Conditions
) -> dict[str, Any]:
    """Keyword arguments of a LatentDiffusionPipeline with the weights of `network`: its components and its config.

    network: the U-Net, or the U-Net with the text encoder that was trained with it.
    """
    scheduler = published_scheduler(config, schedule)
    parts = {
        **condition_parts(network, latents, conditions),
        "scheduler": scheduler,
        "default_sampler": (config.sample.sampler or "dpmpp_2m") if scheduler is None else None,
        "prediction": config.prediction,
        "schedule": {"name": config.schedule.name, **config.schedule.params},
        "image_condition": conditions.image.condition.published() if conditions.image else None,
    }
    return parts if config.bridge is None else {**parts, "bridge": config.bridge.source}


def condition_parts(network: nn.Module, latents: Latents, conditions: Conditions) -> dict[str, Any]:
    """The arguments that both kinds of pipeline have: the networks, classes and text, and the size of images."""
    classes, text = conditions.classes, conditions.text
    unet, text_encoder = network, text and text.prompt_encoder.encoder
    if isinstance(network, UNetWithTextEncoder):
        unet, text_encoder = network.unet, network.text_encoder
    drops_text = text is not None and (text.dropout > 0 or conditions.joint > 0)
    return {
        "unet": unet,
        "vae": latents.codec.vae,
        "text_encoder": text_encoder,
        "tokenizer": text and text.prompt_encoder.tokenizer,
        "class_names": latents.images.class_names if classes else None,
        "null_class": classes.null_class if classes else None,
        "null_prompt": NULL_PROMPT if drops_text else None,
        "image_size": latents.images.preprocess.content[2:],
    }


def run_facts(config: DiffusionConfig | DiscreteConfig, latents: Latents, ema_updates: int, step: int) -> dict[str, Any]:
    """What latentdiff.json says of a run of either kind: its config, steps, average, data and autoencoder."""
    images = latents.images.train
    return {
        "config": config.model_dump(mode="json"),
        "steps": step,
        "ema": {"decay": config.ema.decay, "power": config.ema.power, "updates": ema_updates},
        "data": {"source": config.data.source, "images": len(images), "fingerprint": images.fingerprint()},
        "autoencoder": {"fingerprint": latents.codec.fingerprint()},
    }


def save_checkpoint(
    config: DiffusionConfig,
    parts: dict[str, Any],
    latents: Latents,
    ema_updates: int,
    folder: Path,
    step: int,
    source: Images | None = None,
    weak: tuple[nn.Module, int] | None = None,
) -> None:
    """Write a pipeline as a checkpoint, with a record of how it was made.

    With model.lora the U-Net is the base with the LoRA merged into it, and the LoRA alone lies beside it, for the base.

    Args:
        config: the run's config.
        parts: what `pipeline_parts` gave, with the averaged weights.
        latents: the latents that the run trained on.
        ema_updates: number of steps that the average is over.
        folder: of the checkpoint; one that is there is replaced.
        step: number of steps that the weights were trained for.
        source: the images that a bridge starts from.
        weak: a weaker U-Net for autoguidance, and its step.
    """
    files = {}
    weaker, weak_step = weak or (None, None)
    if config.model.lora is not None:
        files[lora.FILE] = lora.lora_file(parts["unet"])
        parts = {**parts, "unet": lora.merged(parts["unet"])}
        weaker = weaker and lora.merged(weaker)
    statistics = latents.cache.statistics()
    meta = {
        **run_facts(config, latents, ema_updates, step),
        "latents": {
            "shape": list(latents.cache.latent_shape),
            "mean": statistics.mean.tolist(),
            "std": statistics.std.tolist(),
            "posterior_share": statistics.posterior_share.tolist(),
        },
    }
    if config.bridge is not None and source is not None:
        data = {"source": config.bridge.source, "images": len(source.train), "fingerprint": source.train.fingerprint()}
        meta["bridge"] = data
    if weaker is not None:
        meta["weak"] = {"steps": weak_step}
    checkpoints.save(
        folder,
        **parts,
        weak=weaker,
        meta=meta,
        files=files,
        default_guidance_scale=guidance_scale(config),
        default_guidance_interval=config.sample.guidance_interval,
        default_num_inference_steps=config.sample.steps,
    )
