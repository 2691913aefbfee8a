"""Pictures that show what a checkpoint's denoiser does: a trajectory, an interpolation, guidance at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
STRENGTHS = (1.0, 2.0, 4.0)
COLUMNS = 8
CLASSIFIER = "classifier"  # the folder of a noise-aware classifier within a checkpoint


@torch.no_grad()
def gallery(
    model: str | Path, data: str, out: str | Path = "gallery", seed: int = 0, steps: int = 40, sampler: str = "dpmpp_2m"
) -> list[Path]:
    """Draw what a class-conditional checkpoint's denoiser does: a trajectory, an interpolation and guidance at several scales.

    trajectory.png: the x0 estimate of one image of each class at 8 times from noise to data.
    interpolation.png: for each class, two test images encoded by the probability-flow ODE, and what decodes from the arc
    between their encodings. The outermost are the round trip of the two.
    guidance.png: one image of each class from the same noise at several scales of classifier-free guidance.
    classifier.png, where the checkpoint has a classifier/: images without a class; the noise-aware classifier on them at
    several strengths; classifier-free guidance at scales 1, 1.5 and 3. A row has the same noise.

    Args:
        model: a checkpoint: a folder or a Hub name.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards.
            Its test images are interpolated between.
        out: a folder.
        seed: of the noise and of the choice of images.
        steps: steps of the sampler.
        sampler: one of latentdiff's samplers (latentdiff.samplers.names()).

    Returns:
        The paths of the pictures.

    Raises:
        UserError: an unconditional checkpoint, one that reads text, an unknown sampler, or data of other classes.
    """
    from latentdiff import samplers
    from latentdiff.checkpoints import load, resolve_model
    from latentdiff.evaluation.reference_data import trained_on_means
    from latentdiff.utils.outputs import check_out_folder

    folder, out = resolve_model(model), check_out_folder(out)
    if sampler not in samplers.names():
        raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(samplers.names())}")
    pipeline = load(folder)
    if not pipeline.num_classes or pipeline.config.null_class is None:
        raise UserError(f"{folder}: the gallery shows classes and guidance; this model has none to show")
    if pipeline.text_encoder is not None:
        raise UserError(f"{folder}: is told by text too, and the gallery is of models of classes alone")
    stage = GallerySampler(pipeline, seed, steps, sampler)
    pairs = _pairs(folder, data, pipeline)  # data of other classes is refused before anything is written
    # Each is written before the next one is made: one that fails, or a signal, costs no picture that is done
    written = [
        stage.save(trajectory(stage), out / "trajectory.png"),
        stage.save(interpolation(stage, *pairs, trained_on_means(folder)), out / "interpolation.png"),
        stage.save([stage.draw(stage.guided(scale)) for scale in SCALES], out / "guidance.png"),
    ]
    if (folder / CLASSIFIER).is_dir():
        from latentdiff.guidance import load_classifier

        classifier = load_classifier(folder / CLASSIFIER)
        written.append(stage.save(classifier_columns(stage, classifier), out / "classifier.png"))
    return written


class GallerySampler:
    """What every picture shares: one noise and one label a class, the denoiser, the sampler, the decoder."""

    def __init__(self, pipeline: LatentDiffusionPipeline, seed: int, steps: int, sampler: str):
        from latentdiff.denoiser import Denoiser
        from latentdiff.models.codec import LatentCodec
        from latentdiff.utils.random import generators, randn

        self.pipeline, self.codec, self.steps, self.sampler = pipeline, LatentCodec(pipeline.vae), steps, sampler
        self.seed = seed
        self.labels = torch.arange(pipeline.num_classes)  # [K]
        self.null = torch.full_like(self.labels, pipeline.config.null_class)
        self.denoiser = Denoiser.from_pipeline(pipeline)
        self.noise = randn((len(self.labels), *pipeline.latent_shape), generators(seed, self.labels.tolist()))  # [K, c, h, w]

    def guided(self, scale: float, labels: Tensor | None = None, interval: Sequence[float] | None = None) -> Any:
        """The denoiser of each class at a classifier-free scale, within an interval of t; labels [K] for the classes'."""
        from latentdiff.guidance import ClassifierFree

        conditional = {"class_labels": self.labels if labels is None else labels}
        return ClassifierFree(self.denoiser, conditional, {"class_labels": self.null}, scale, interval=interval)

    def draw(self, denoiser: Any, noise: Tensor | None = None, callback: Any = None) -> Tensor:
        """One image a class from the same noise: [K, C, H, W]."""
        from latentdiff.samplers import sample

        start = self.noise if noise is None else noise
        return self.decode(sample(denoiser, start, self.sampler, self.steps, callback=callback))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [K, C, H, W] in about [-1, 1] without the padded border."""
        images = self.codec.decode(latents)
        height, width = self.pipeline.config.image_size or images.shape[-2:]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        return images[..., top : top + height, left : left + width]

    def save(self, columns: Sequence[Tensor], path: Path) -> Path:
        """A row a class, named; the columns are image batches [K, C, H, W]."""
        from latentdiff.utils.images import labelled_grid, save_png, to_uint8

        cells = [list(to_uint8(column.clamp(-1, 1))) for column in columns]
        rows: list[list[np.ndarray]] = [list(row) for row in zip(*cells, strict=True)]
        save_png(labelled_grid(rows, self.pipeline.class_names or [str(k) for k in self.labels.tolist()]), path)
        return path


def trajectory(stage: GallerySampler) -> list[Tensor]:
    """Decoded x0 estimates at COLUMNS of the sampler's steps, evenly spread, the last among them: [K, C, H, W] each."""
    seen: list[Tensor] = []
    config = stage.pipeline.config
    denoiser = stage.guided(config.default_guidance_scale, interval=config.default_guidance_interval)
    stage.draw(denoiser, callback=lambda _, __, ___, x0: seen.append(x0))
    kept = np.linspace(0, len(seen) - 1, min(COLUMNS, len(seen))).round().astype(int)
    return [stage.decode(seen[k]) for k in kept]


def interpolation(stage: GallerySampler, first: Tensor, second: Tensor, use_mean: bool = False) -> list[Tensor]:
    """The two images [K, C, H, W] of each class at the ends, and decodings from the arc between their encodings.

    What is encoded is a draw from each posterior, as the denoiser was trained on: the encodings of means are too small to be
    noise.  use_mean: the means, where it was trained on those.
    """
    from latentdiff.samplers import encode, sample, slerp
    from latentdiff.utils.random import derive_seed, generators

    denoiser = stage.guided(1.0)  # guidance has no inverse worth the name: the ODE of the conditional model itself
    draws = [generators(derive_seed(stage.seed, "posterior", side), stage.labels.tolist()) for side in (0, 1)]
    ends = [stage.codec.latents(images, draw, use_mean) for images, draw in zip((first, second), draws, strict=True)]
    noises = [encode(denoiser, z, "heun", stage.steps) for z in ends]
    arc = [slerp(noises[0], noises[1], w) for w in np.linspace(0, 1, COLUMNS - 2).tolist()]
    between = [stage.decode(sample(denoiser, noise, "heun", stage.steps)) for noise in arc]
    return [stage.decode(ends[0]), *between, stage.decode(ends[1])]


def classifier_columns(stage: GallerySampler, classifier: Any) -> list[Tensor]:
    """No class; the classifier on the unconditional model; the conditional model and its classifier-free guidance."""
    from latentdiff.guidance import Classifier

    unconditional = stage.guided(1.0, stage.null)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return classifier(x, t, stage.labels)

    by_classifier = [stage.draw(Classifier(unconditional, log_prob, strength)) for strength in STRENGTHS]
    return [stage.draw(unconditional), *by_classifier, *(stage.draw(stage.guided(scale)) for scale in (1.0, 1.5, 3.0))]


def _pairs(folder: Path, data: str, pipeline: LatentDiffusionPipeline) -> tuple[Tensor, Tensor]:
    """The first two test images of each class, preprocessed as in training: [K, C, H, W] each."""
    from latentdiff.evaluation.reference_data import data_rule, reference_sets
    from latentdiff.models.codec import LatentCodec

    _, test = reference_sets(data, *data_rule(folder, LatentCodec(pipeline.vae)))
    if test.labels is None or (pipeline.class_names and list(test.class_names) != pipeline.class_names):
        raise UserError(f"--data {data}: its classes are not the model's ({', '.join(pipeline.class_names)})")
    rows = [(test.labels == k).nonzero()[:2, 0] for k in range(pipeline.num_classes)]
    if any(len(pair) < 2 for pair in rows):
        raise UserError(f"--data {data}: every class needs two held-out images to interpolate between")
    first, second = torch.stack(rows).T
    return test.batch(first)[0], test.batch(second)[0]
