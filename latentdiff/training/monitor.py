"""What is looked at while stage 2 trains: a grid of generated images, and their Fréchet distance from the training images.

The distance is cheap and coarse: few images, and a reference of some training images. Compare the numbers of one run, or of
runs with the same settings. For results to report, use `latentdiff evaluate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import resolve_model
from latentdiff.config import DiffusionConfig, DiscreteConfig
from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import UserError
from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.models.feature_net import FeatureNet, extract, load_features
from latentdiff.training.conditioning import Conditions, guidance_scale
from latentdiff.training.images import Images
from latentdiff.training.latents import Latents
from latentdiff.utils.images import save_rows
from latentdiff.utils.random import derive_seed, generators

ROWS = 8  # of a picture, for a model without classes where the config names no prompts
MAX_CLASSES = 10  # that a picture shows
BATCH = 125  # images that are generated at a time to measure the distance
# start(numbers) -> the latents [B, c, h, w] that a bridge's pictures of these numbers start from
Start = Callable[[list[int]], Tensor]


def check(config: DiffusionConfig | DiscreteConfig) -> None:
    """UserError for a measurement without a feature network, or a best state by a distance that is never measured."""
    evaluate = config.evaluate
    if config.train.best == "evaluation/frechet" and evaluate.every is None:
        raise UserError("train.best: evaluation/frechet is never measured; set evaluate.every and evaluate.features")
    if evaluate.every is not None and evaluate.features is None:
        raise UserError("evaluate.features: name the folder of a feature network, such as weights/fashion-mnist-features")
    load_net(config, torch.device("cpu"))


def load_net(config: DiffusionConfig | DiscreteConfig, device: torch.device) -> FeatureNet | None:
    """The feature network of evaluate.features; None where evaluate.every is not set. UserError where there is none."""
    if config.evaluate.every is None:
        return None
    return load_features(resolve_model(str(config.evaluate.features), "evaluate.features", "model.safetensors"), device)


@torch.no_grad()
def save_picture(
    config: DiffusionConfig,
    parts: dict[str, Any],
    conditions: Conditions,
    images_of: Images,
    accelerator: Any,
    path: Path,
    start: Start | None = None,
) -> None:
    """Write a grid of generated images, one row per class or prompt, from fixed seeds.

    Of a model with a second image a row is of a held-out image: first what is given, then what is made of it.
    parts: what `pipeline_parts` gave. images_of: the run's images. start: where a bridge's pictures start. Every process calls
    this and draws its share of the rows; the main one writes.
    """
    pipeline = sampling_pipeline(config, parts)
    classes: list[int | None] = list(range(min(MAX_CLASSES, pipeline.num_classes))) or [None] * ROWS
    prompts: list[str] | None = None
    if conditions.text:
        prompts = config.sample.prompts or conditions.example_captions(classes)
        classes = [classes[k % len(classes)] for k in range(len(prompts))]
    rows: Tensor | None = None
    if conditions.image:  # of held-out images, under their own classes and captions
        rows = images_of.held_out_rows(ROWS)
        labels, texts = images_of.held_out_batch(ROWS)[1], images_of.held_out_captions(ROWS)
        classes = labels.tolist() if pipeline.num_classes and labels is not None else [None] * len(rows)
        prompts = texts if conditions.text else None
    each = config.sample.per_class

    def draw(chosen: list[int]) -> Tensor:
        numbers = [k * each + i for k in chosen for i in range(each)]
        beside = {} if rows is None else condition_arguments(conditions, images_of, rows[chosen])
        images = pipeline(
            prompt=None if prompts is None else [prompts[k] for k in chosen],
            class_labels=[classes[k] for k in chosen],
            num_images_per_label=each,
            guidance_interval=config.sample.guidance_interval,
            num_inference_steps=config.sample.steps,
            generator=generators(config.seed, numbers),
            output_type="pt",
            **from_start(start, numbers),
            **beside,
        ).images
        images = images.unflatten(0, (len(chosen), each))
        if rows is None:
            return images
        return torch.cat([_shown(conditions, images_of, rows[chosen], images.shape[-2:]).to(images)[:, None], images], dim=1)

    images = _in_shares(len(classes), accelerator, draw)  # [rows, each, C, H, W]
    if accelerator.is_main_process:
        save_rows(list(images * 2 - 1), path)


class Monitor:
    """Measures the Fréchet distance of generated images. Each process makes a share of them; all get the same numbers.

    Attributes:
        reference: feature statistics of evaluate.reference training images, or of all.
        floor: the distance of evaluate.images held-out images, or of all, from the same reference.
    """

    def __init__(self, config: DiffusionConfig, latents: Latents, conditions: Conditions, net: FeatureNet, accelerator: Any):
        self.config, self.net, self.accelerator = config, net, accelerator
        self.images, self.conditions = latents.images, conditions
        self.reference = self._statistics(latents.images.train, config.evaluate.reference)
        self.floor = frechet_distance(self._statistics(latents.images.held_out, config.evaluate.images), self.reference)

    def measure(self, parts: dict[str, Any], start: Start | None = None) -> dict[str, float]:
        """{"evaluation/frechet", "evaluation/floor", "evaluation/seconds"} of a pipeline.

        parts: from `pipeline_parts`. start: where a bridge's pictures start.
        """
        began = time.monotonic()
        config = self.config
        pipeline = sampling_pipeline(config, parts)
        texts = self.images.held_out_captions(config.evaluate.images) if self.conditions.text else None
        classes = list(range(pipeline.num_classes)) or [None]
        rows: Tensor | None = None
        if self.conditions.image:
            rows = self.images.held_out_rows(config.evaluate.images)
            labels = self.images.held_out.labels
            classes = [None] if labels is None or not pipeline.num_classes else labels[rows].tolist()

        def draw(numbers: list[int]) -> Tensor:
            beside = {}
            if rows is not None:
                beside = condition_arguments(self.conditions, self.images, rows[[k % len(rows) for k in numbers]])
            with self.accelerator.autocast():
                images = pipeline(
                    prompt=None if texts is None else [texts[k % len(texts)] for k in numbers],
                    class_labels=[classes[k % len(classes)] for k in numbers],
                    guidance_interval=config.sample.guidance_interval,
                    num_inference_steps=config.sample.steps,
                    generator=generators(derive_seed(config.seed, "evaluate"), numbers),
                    output_type="pt",
                    **from_start(start, numbers),
                    **beside,
                ).images
            # Rounded to 8 bits, as the real images are
            return (images.float() * 255).round() / 127.5 - 1

        return {
            "evaluation/frechet": frechet_distance(self._feature_statistics(config.evaluate.images, draw), self.reference),
            "evaluation/floor": self.floor,
            "evaluation/seconds": time.monotonic() - began,
        }

    def _statistics(self, dataset: ImageDataset, count: int) -> Moments:
        """Feature statistics of `count` images, or of all, evenly spread over a data set and without its padding."""
        plain = without_padding(dataset)
        rows = torch.linspace(0, len(plain) - 1, min(count, len(plain))).long()
        return self._feature_statistics(len(rows), lambda numbers: plain.batch(rows[numbers])[0])

    def _feature_statistics(self, count: int, images: Callable[[list[int]], Tensor]) -> Moments:
        """Feature statistics of images(numbers) for the numbers 0 to count - 1, in batches."""

        def features(numbers: list[int]) -> Tensor:
            batches = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
            return torch.cat([extract(self.net, images(batch))[0] for batch in batches])

        rows = _in_shares(count, self.accelerator, features)  # [count, D]
        return Moments(rows.shape[1]).update(rows)


def from_start(start: Start | None, numbers: list[int]) -> dict[str, Tensor]:
    """The argument of a pipeline's call that says where a bridge's pictures of these numbers start; none without a bridge."""
    return {} if start is None else {"latents": start(numbers)}


def condition_arguments(conditions: Conditions, images: Images, rows: Tensor) -> dict[str, Tensor]:
    """Arguments of a pipeline's call for the condition images of held-out images; rows: their places, int64 [B]."""
    assert conditions.image is not None
    given, hidden = conditions.image.of_held_out(images.held_out, rows)
    # Sums of rounded numbers may leave the range by an ulp, which the pipeline refuses
    arguments = {"condition_image": (given / 2 + 0.5).clamp(0, 1)}
    return arguments if hidden is None else {**arguments, "condition_mask": hidden}


def _shown(conditions: Conditions, images: Images, rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Condition images of held-out images for a picture, at `size` (H, W): [B, C, H, W] in [0, 1]; what is hidden is grey."""
    arguments = condition_arguments(conditions, images, rows)
    given = torch.nn.functional.interpolate(arguments["condition_image"], size)  # by the nearest pixel
    return given if "condition_mask" not in arguments else torch.where(arguments["condition_mask"] >= 0.5, 0.5, given)


def sampling_pipeline(config: DiffusionConfig | DiscreteConfig, parts: dict[str, Any], refuse_non_finite: bool = False) -> Any:
    """A quiet pipeline with the config's guidance scale. parts: what `pipeline_parts` gave, or `discrete_parts`.

    refuse_non_finite: raise NotFiniteError for such an image. By default it is no error: training goes on.
    """
    from latentdiff.checkpoints import pipeline_class

    # The scale is given as a default: then it is off without a condition, and a call would be refused
    pipeline = pipeline_class(parts)(**parts, default_guidance_scale=guidance_scale(config))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.refuse_non_finite = refuse_non_finite
    return pipeline


def _in_shares(count: int, accelerator: Any, make: Callable[[list[int]], Tensor]) -> Tensor:
    """make(numbers) for the numbers 0 to count - 1, [count, ...] on the CPU. Each process makes a contiguous share."""
    share = -(-count // accelerator.num_processes)
    first = accelerator.process_index * share
    # Every process makes equally many, as gathering needs; the last ones repeat some of the first
    rows = make([k % count for k in range(first, first + share)])
    if accelerator.num_processes > 1:
        rows = accelerator.gather(rows.to(accelerator.device).contiguous())
    return rows[:count].cpu()
