"""The Fréchet distance measured while stage 2 trains: images of the averaged weights against training images.

It is cheap and coarse: few images, and a reference of some training images. Compare the numbers of one run, or of runs with
the same settings. For results to report, use `latentdiff evaluate`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.config import DiffusionConfig
from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import UserError
from latentdiff.training import conditioning
from latentdiff.training.latents import Latents
from latentdiff.utils.random import derive_seed, generators

if TYPE_CHECKING:
    from latentdiff.evaluation.frechet import Moments
    from latentdiff.models.feature_net import FeatureNet

BATCH = 125


def check(config: DiffusionConfig) -> None:
    """UserError for a measurement without a feature network, or a best state by a distance that is never measured."""
    evaluate = config.evaluate
    if config.train.best == "evaluation/frechet" and evaluate.every is None:
        raise UserError("train.best: evaluation/frechet is never measured; set evaluate.every and evaluate.features")
    if evaluate.every is not None and evaluate.features is None:
        raise UserError("evaluate.features: name the folder of a feature network, such as weights/fashion-mnist-features")
    load_net(config, torch.device("cpu"))


def load_net(config: DiffusionConfig, device: torch.device) -> FeatureNet | None:
    """The feature network of evaluate.features; None where evaluate.every is not set. UserError where there is none."""
    from latentdiff.checkpoints import resolve_model
    from latentdiff.models.feature_net import load_features

    if config.evaluate.every is None:
        return None
    folder = resolve_model(str(config.evaluate.features), "evaluate.features", "model.safetensors")
    return load_features(folder, device)


class Monitor:
    """Measures the Fréchet distance of generated images. Each process makes a share of them; all get the same numbers.

    Attributes:
        reference: feature statistics of evaluate.reference training images, or of all.
        floor: the distance of evaluate.images held-out images, or of all, from the same reference.
    """

    def __init__(
        self, config: DiffusionConfig, latents: Latents, conditions: conditioning.Conditions, net: FeatureNet, accelerator: Any
    ):
        from latentdiff.evaluation.frechet import frechet_distance

        self.config, self.net, self.accelerator = config, net, accelerator
        self.images, self.conditions = latents.images, conditions
        self.reference = self._statistics(latents.images.train, config.evaluate.reference)
        self.floor = frechet_distance(self._statistics(latents.images.held_out, config.evaluate.images), self.reference)

    def measure(self, pieces: dict[str, Any]) -> dict[str, float]:
        """{"evaluation/frechet", "evaluation/floor", "evaluation/seconds"} of a pipeline with these parts."""
        from latentdiff.evaluation.frechet import frechet_distance

        began = time.monotonic()
        features = self._in_shares(self.config.evaluate.images, self._generator(pieces))
        return {
            "evaluation/frechet": frechet_distance(_moments(features), self.reference),
            "evaluation/floor": self.floor,
            "evaluation/seconds": time.monotonic() - began,
        }

    def _generator(self, pieces: dict[str, Any]) -> Any:
        """features(numbers): the features of generated images; each follows from the run's seed and its number."""
        from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

        config, sample = self.config, self.config.sample
        pipeline = LatentDiffusionPipeline(**pieces, default_guidance_scale=conditioning.guidance_scale(config))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.refuse_non_finite = False  # training judges by its loss, and goes on
        texts = self.images.held_out_captions(config.evaluate.images) if self.conditions.text else None
        classes = list(range(pipeline.num_classes)) or [None]

        def features(numbers: list[int]) -> Tensor:
            with self.accelerator.autocast():
                images = pipeline(
                    prompt=None if texts is None else [texts[k % len(texts)] for k in numbers],
                    class_labels=[classes[k % len(classes)] for k in numbers],
                    guidance_interval=sample.guidance_interval,
                    num_inference_steps=sample.steps,
                    generator=generators(derive_seed(config.seed, "evaluate"), numbers),
                    output_type="pt",
                ).images
            # Rounded to 8 bits, as the real images are
            return self._features((images.float() * 255).round() / 127.5 - 1)

        return features

    def _statistics(self, dataset: ImageDataset, count: int) -> Moments:
        """Moments of the features of `count` images, or all there are, spread evenly over a part and without its padding."""
        from latentdiff.evaluation.sample_sets import without_padding

        plain = without_padding(dataset)
        rows = torch.linspace(0, len(plain) - 1, min(count, len(plain))).long()
        return _moments(self._in_shares(len(rows), lambda numbers: self._features(plain.batch(rows[numbers])[0])))

    def _features(self, images: Tensor) -> Tensor:
        from latentdiff.models.feature_net import extract

        return extract(self.net, images)[0]

    def _in_shares(self, count: int, features: Any) -> Tensor:
        """Features [count, D] of numbers 0 to count - 1. Each process computes a contiguous share, in batches."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-count // world)
        # Every process computes equally many, as gathering needs; the last ones repeat some of the first
        mine = [k % count for k in range(rank * share, (rank + 1) * share)]
        rows = torch.cat([features(mine[start : start + BATCH]) for start in range(0, share, BATCH)])
        if world > 1:
            rows = self.accelerator.gather(rows.to(self.accelerator.device).contiguous()).cpu()
        return rows[:count]


def _moments(features: Tensor) -> Moments:
    from latentdiff.evaluation.frechet import Moments

    return Moments(features.shape[1]).update(features)
