"""A distance measured while stage 2 trains: images of the averaged weights against training images, beside the floor.

It is cheap and so coarse: few images, and a reference of some of the training images. Numbers of one run compare with each
other, and with another run's of the same settings; what is quoted is `latentdiff evaluate`'s.
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
    """UserError for settings that measure nothing, or for a best state by a distance that is never measured."""
    wanted = config.evaluate
    if config.train.best == "evaluation/frechet" and wanted.every is None:
        raise UserError("train.best: evaluation/frechet is never measured; set evaluate.every and evaluate.features")
    if wanted.every is not None and wanted.features is None:
        raise UserError("evaluate.features: name the folder of a feature network, such as weights/fashion-mnist-features")
    load_net(config, torch.device("cpu"))


def load_net(config: DiffusionConfig, device: torch.device) -> FeatureNet | None:
    """The feature network of a run that is measured; None where it is not. UserError where there is no such network."""
    from latentdiff.checkpoints import resolve_model
    from latentdiff.models.feature_net import load_features

    if config.evaluate.every is None:
        return None
    folder = resolve_model(str(config.evaluate.features), "evaluate.features", "model.safetensors")
    return load_features(folder, device)


class Monitor:
    """Measures a run's pictures; every process makes and looks at its share, and all hold the same numbers.

    floor: the distance of as many held-out images (fewer where there are fewer) from the same reference.
    """

    def __init__(
        self, config: DiffusionConfig, latents: Latents, told: conditioning.Conditions, net: FeatureNet, accelerator: Any
    ):
        from latentdiff.evaluation.frechet import frechet_distance

        self.config, self.net, self.accelerator = config, net, accelerator
        self.images, self.told = latents.images, told
        self.reference = self._seen(latents.images.train, config.evaluate.reference)
        self.floor = frechet_distance(self._seen(latents.images.held_out, config.evaluate.images), self.reference)

    def measure(self, pieces: dict[str, Any]) -> dict[str, float]:
        """Distance, floor and seconds of the pipeline of these parts."""
        from latentdiff.evaluation.frechet import frechet_distance

        began = time.monotonic()
        features = self._shared(self.config.evaluate.images, self._drawer(pieces))
        return {
            "evaluation/frechet": frechet_distance(_moments(features), self.reference),
            "evaluation/floor": self.floor,
            "evaluation/seconds": time.monotonic() - began,
        }

    def _drawer(self, pieces: dict[str, Any]) -> Any:
        """features(numbers of images): of images that are functions of the run's seed and their number."""
        from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

        config, sample = self.config, self.config.sample
        pipeline = LatentDiffusionPipeline(**pieces, default_guidance_scale=conditioning.guidance_scale(config))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.refuse_non_finite = False  # training judges by its loss, and goes on
        texts = self.images.held_out_captions(config.evaluate.images) if self.told.text else None
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
            # As a PNG would hold them, and as the real ones come
            return self._features((images.float() * 255).round() / 127.5 - 1)

        return features

    def _seen(self, dataset: ImageDataset, count: int) -> Moments:
        """Moments of the features of `count` images, or all there are, spread evenly over a part and without its padding."""
        from latentdiff.evaluation.sample_sets import without_padding

        plain = without_padding(dataset)
        rows = torch.linspace(0, len(plain) - 1, min(count, len(plain))).long()
        return _moments(self._shared(len(rows), lambda numbers: self._features(plain.batch(rows[numbers])[0])))

    def _features(self, images: Tensor) -> Tensor:
        from latentdiff.models.feature_net import extract

        return extract(self.net, images)[0]

    def _shared(self, count: int, features: Any) -> Tensor:
        """[count, D] of numbers 0 ... count - 1, each process computing a contiguous share in batches."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-count // world)
        # Every process computes as many, the last ones some of the first again, so that they can be gathered
        mine = [k % count for k in range(rank * share, (rank + 1) * share)]
        rows = torch.cat([features(mine[start : start + BATCH]) for start in range(0, share, BATCH)])
        if world > 1:
            rows = self.accelerator.gather(rows.to(self.accelerator.device).contiguous()).cpu()
        return rows[:count]


def _moments(features: Tensor) -> Moments:
    from latentdiff.evaluation.frechet import Moments

    return Moments(features.shape[1]).update(features)
