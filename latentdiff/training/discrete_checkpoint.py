"""Stage 2 over codes as a pipeline, and the checkpoint that a run publishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from latentdiff import checkpoints
from latentdiff.config import DiscreteConfig
from latentdiff.models.codebook import CodeUsage
from latentdiff.training.conditioning import Conditions, guidance_scale
from latentdiff.training.diffusion_checkpoint import condition_parts, run_facts
from latentdiff.training.latents import Latents


def discrete_parts(config: DiscreteConfig, network: nn.Module, latents: Latents, conditions: Conditions) -> dict[str, Any]:
    """Keyword arguments of a DiscreteDiffusionPipeline with the weights of `network`: its components and its config.

    network: the U-Net, or the U-Net with the text encoder that was trained with it.
    """
    return {
        **condition_parts(network, latents, conditions),
        "process": {"name": config.process, "schedule": config.schedule, "levels": config.levels},
        "default_sampler": config.sample.order,
    }


def save_discrete(
    config: DiscreteConfig, parts: dict[str, Any], latents: Latents, ema_updates: int, folder: Path, step: int
) -> None:
    """Write a pipeline as a checkpoint, with a record of how it was made; arguments as `save_checkpoint`."""
    codes = latents.codec.num_codes
    assert codes is not None
    counts = latents.cache.code_counts(codes)  # [L, K]
    usages = [CodeUsage.of(level) for level in counts]
    codebook = {
        "shape": list(latents.cache.latent_shape),
        "codes": codes,
        "usage": [usage.usage() for usage in usages],
        "perplexity": [usage.perplexity() for usage in usages],
    }
    checkpoints.save(
        folder,
        **parts,
        scheduler=None,
        meta={**run_facts(config, latents, ema_updates, step), "codes": codebook},
        default_guidance_scale=guidance_scale(config),
        default_guidance_interval=config.sample.guidance_interval,
        default_num_inference_steps=config.sample.steps,
    )
