"""`latentdiff gallery`: pictures that show what a checkpoint's denoiser does: trajectory, interpolation, guidance."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentdiff.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

ROWS = 8  # of a model without classes
ROW_NAME = 40  # characters of a caption beside its row
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
STRENGTHS = (1.0, 2.0, 4.0)
COLUMNS = 8
CLASSIFIER = "classifier"  # the folder of a noise-aware classifier in a checkpoint


def gallery(
    model: str | Path, data: str, out: str | Path = "gallery", seed: int = 0, steps: int = 40, sampler: str = "dpmpp_2m"
) -> list[Path]:
    """Draw what a checkpoint's denoiser does: a trajectory, an interpolation and guidance at several scales.

    A row is a class; of a model that reads text the caption of a test image; else nothing in particular.

    trajectory.png: the x0 estimate of one image of each row at 8 times from noise to data.
    interpolation.png: for each row, two test images encoded by the probability-flow ODE, and what decodes from the arc
    between their encodings. The outermost are the round trip of the two.
    guidance.png, where the model has classes or reads text: one image of each row from the same noise at several scales of
    classifier-free guidance.
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
        UserError: an unknown sampler, data of other classes, without captions for a model that reads text, or with fewer than
            two held-out images; or a bridge, which has no noise.
    """
    import torch

    from latentdiff import samplers
    from latentdiff.checkpoints import load, refuse_bridge, resolve_model
    from latentdiff.evaluation.reference_data import trained_on_means
    from latentdiff.generation import place, refuse_second_image
    from latentdiff.utils.outputs import check_out_folder

    folder, out = resolve_model(model), check_out_folder(out)
    if sampler not in samplers.names():
        raise UserError(f"--sampler {sampler}: unknown; valid: {', '.join(samplers.names())}")
    pipeline = load(folder)
    place(pipeline, "cpu")
    refuse_second_image(pipeline, "gallery")
    refuse_bridge(pipeline, "MODEL")
    with torch.no_grad():
        # Data that do not fit are refused before anything is written
        rows = others = None
        if pipeline.num_classes and pipeline.text_encoder is None:
            pairs = _pairs(folder, data, pipeline)
        else:
            *pairs, rows, others = _spread_pairs(folder, data, pipeline)
        images = GallerySampler(pipeline, seed, steps, sampler, rows)
        # Each picture is written before the next is made, so that an error or a signal loses no finished picture
        written = [images.save(trajectory(images), out / "trajectory.png")]
        arc = interpolation(images, *pairs, trained_on_means(folder), others)
        written.append(images.save(arc, out / "interpolation.png"))
        if images.has_guidance:
            written.append(images.save([images.draw(images.guided(scale)) for scale in SCALES], out / "guidance.png"))
        if (folder / CLASSIFIER).is_dir() and rows is None and images.has_guidance:
            from latentdiff.guidance import load_classifier

            classifier = load_classifier(folder / CLASSIFIER)
            written.append(images.save(classifier_columns(images, classifier), out / "classifier.png"))
    return written


class GallerySampler:
    """Draws one image of each of K rows, always from the same noise.

    Args:
        pipeline: a checkpoint.
        seed: of the noise.
        steps: of the sampler.
        sampler: its name.
        rows: what the rows show: classes by number, prompts, or None for nothing in particular. None: all classes.

    Attributes:
        rows: what each row shows: classes, prompts or None.
        labels: the numbers of the rows, int64 [K]: the classes, where rows are classes.
        null: the null class, [K] times.
        has_guidance: whether classifier-free guidance can change the images.
        noise: [K, c, h, w].
        denoiser: of the checkpoint.
        codec: its autoencoder.
    """

    def __init__(
        self,
        pipeline: LatentDiffusionPipeline,
        seed: int,
        steps: int,
        sampler: str,
        rows: Sequence[Any] | None = None,
    ):
        import torch

        from latentdiff.denoiser import Denoiser
        from latentdiff.models.codec import LatentCodec
        from latentdiff.utils.random import generators, randn

        self.pipeline, self.codec, self.steps, self.sampler = pipeline, LatentCodec(pipeline.vae), steps, sampler
        self.seed = seed
        self.rows: list[Any] = list(range(pipeline.num_classes)) if rows is None else list(rows)
        self.labels = torch.arange(len(self.rows))
        null_class, reads_text = pipeline.config.null_class, pipeline.text_encoder is not None
        self.null = torch.full_like(self.labels, 0 if null_class is None else null_class)
        drops = pipeline.config.null_prompt is not None if reads_text else null_class is not None
        self.has_guidance = drops and any(row is not None for row in self.rows)
        self.denoiser = Denoiser.from_pipeline(pipeline)
        self.noise = randn((len(self.labels), *pipeline.latent_shape), generators(seed, self.labels.tolist()))

    def guided(
        self,
        scale: float,
        labels: Tensor | None = None,
        interval: Sequence[float] | None = None,
        rows: Sequence[Any] | None = None,
    ) -> Any:
        """The denoiser with classifier-free guidance.

        labels: [K] in place of the classes. interval: of t, where to guide. rows: in place of the sampler's own.
        """
        from latentdiff.editing import subject_conditioning
        from latentdiff.guidance import ClassifierFree

        shown = list(self.rows if rows is None else rows)
        conditional = subject_conditioning(self.pipeline, shown) if labels is None else {"class_labels": labels}
        nothing = subject_conditioning(self.pipeline, [None] * len(shown)) if scale != 1 else {}
        return ClassifierFree(self.denoiser, conditional, nothing, scale, interval=interval)

    def draw(self, denoiser: Any, callback: Any = None) -> Tensor:
        """One image of each row, [K, C, H, W] in about [-1, 1]. callback: of the sampler."""
        from latentdiff.samplers import sample

        return self.decode(sample(denoiser, self.noise, self.sampler, self.steps, callback=callback))

    def decode(self, latents: Tensor) -> Tensor:
        """Images [K, C, H, W] in about [-1, 1], without the padded border."""
        images = self.codec.decode(latents)
        height, width = self.pipeline.config.image_size or images.shape[-2:]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        return images[..., top : top + height, left : left + width]

    def save(self, columns: Sequence[Tensor], path: Path) -> Path:
        """Write a PNG with a name at each row; return its path. columns: batches of images [K, C, H, W]."""
        from latentdiff.utils.images import labelled_grid, save_png, to_uint8

        cells = [list(to_uint8(column.clamp(-1, 1))) for column in columns]
        rows = [list(row) for row in zip(*cells, strict=True)]
        save_png(labelled_grid(rows, self.names), path)
        return path

    @property
    def names(self) -> list[str]:
        """The name of each row: its class or prompt, or its number."""
        classes = self.pipeline.class_names
        names = []
        for k, row in enumerate(self.rows):
            if isinstance(row, str):
                names.append(textwrap.shorten(row, ROW_NAME, placeholder=" …"))
            else:
                names.append(classes[row] if classes and row is not None else str(k))
        return names


def trajectory(images: GallerySampler, columns: int = COLUMNS, scale: float | None = None) -> list[Tensor]:
    """Decoded x0 estimates at some of the sampler's steps, evenly spread, the last one included: [K, C, H, W] each.

    columns: how many; no more than there are steps. scale: of classifier-free guidance; None: the model's default.
    """
    estimates: list[Tensor] = []
    config = images.pipeline.config
    scale = config.default_guidance_scale if scale is None else scale
    denoiser = images.guided(scale, interval=config.default_guidance_interval)
    images.draw(denoiser, callback=lambda _, __, ___, x0: estimates.append(x0))
    steps = np.linspace(0, len(estimates) - 1, min(columns, len(estimates))).round().astype(int)
    return [images.decode(estimates[k]) for k in steps]


def interpolation(
    images: GallerySampler,
    first: Tensor,
    second: Tensor,
    use_mean: bool = False,
    second_rows: Sequence[Any] | None = None,
) -> list[Tensor]:
    """COLUMNS (8) batches of images that lead from `first` to `second`, each [K, C, H, W] in about [-1, 1].

    The first and the last batch are the autoencoder's reconstructions of the two. The six between are on an arc: both images
    are encoded into noise (`samplers.encode`), the noises are interpolated (`samplers.slerp`, at weights 0 to 1), and each
    result is decoded by the same ODE without guidance (DDIM, arXiv 2010.02502, section 5.3).

    Args:
        images: draws images of the K rows.
        first, second: one image of each row, [K, C, H, W] in [-1, 1].
        use_mean: encode the means of the autoencoder's posterior, for a denoiser that was trained on means. By default a draw
            from the posterior is encoded. The encodings of means would then have too small a variance for noise.
        second_rows: what `second` shows, where that is not what the rows are. The estimates of the two are then averaged.
    """
    import torch

    from latentdiff.samplers import encode, sample, slerp
    from latentdiff.translation import Between
    from latentdiff.utils.random import derive_seed, generators

    denoiser = images.guided(1.0)  # guidance has no useful inverse: this is the ODE of the conditional model itself
    draws = [generators(derive_seed(images.seed, "posterior", side), images.labels.tolist()) for side in (0, 1)]
    ends = [images.codec.latents(x, draw, use_mean) for x, draw in zip((first, second), draws, strict=True)]
    other = denoiser if second_rows is None else images.guided(1.0, rows=second_rows)
    noises = [encode(each, z, "heun", images.steps) for each, z in zip((denoiser, other), ends, strict=True)]
    between = []
    for weight in np.linspace(0, 1, COLUMNS - 2).tolist():
        mixed = denoiser if other is denoiser else Between(denoiser, other, torch.full((len(first),), weight))
        noise = slerp(noises[0], noises[1], weight)
        between.append(images.decode(sample(mixed, noise, "heun", images.steps)))
    return [images.decode(ends[0]), *between, images.decode(ends[1])]


def classifier_columns(images: GallerySampler, classifier: Any) -> list[Tensor]:
    """Without a class; the classifier on the unconditional model; classifier-free guidance: [K, C, H, W] each."""
    from latentdiff.guidance import Classifier

    unconditional = images.guided(1.0, images.null)

    def log_prob(x: Tensor, t: Tensor) -> Tensor:
        return classifier(x, t, images.labels)

    by_classifier = [images.draw(Classifier(unconditional, log_prob, strength)) for strength in STRENGTHS]
    return [images.draw(unconditional), *by_classifier, *(images.draw(images.guided(scale)) for scale in (1.0, 1.5, 3.0))]


def _spread_pairs(
    folder: Path, data: str, pipeline: LatentDiffusionPipeline
) -> tuple[Tensor, Tensor, list[str | None], list[str | None]]:
    """(first, second, what first shows, what second shows) of up to ROWS pairs of test images, evenly spread: [K, C, H, W].

    What they show is their caption for a model that reads text, else None.
    """
    import torch

    from latentdiff.evaluation.reference_data import data_rule, reference_sets
    from latentdiff.models.codec import LatentCodec

    _, test = reference_sets(data, *data_rule(folder, LatentCodec(pipeline.vae)))
    count = min(ROWS, len(test) // 2)
    if count < 1:
        raise UserError(f"--data {data}: needs two held-out images to interpolate between")
    places = torch.linspace(0, len(test) - 1, 2 * count).round().long()
    shown: list[str | None] = [None] * len(places)
    if pipeline.text_encoder is not None:
        captions = test.source.captions
        if captions is None:
            raise UserError(f"--data {data}: its images have no captions, which this model reads")
        shown = [captions[k][0] for k in test.indices[places].tolist()]
    images = test.batch(places)[0]
    return images[::2], images[1::2], shown[::2], shown[1::2]


def _pairs(folder: Path, data: str, pipeline: LatentDiffusionPipeline) -> tuple[Tensor, Tensor]:
    """The first two test images of each class, preprocessed as in training: [K, C, H, W] each."""
    import torch

    from latentdiff.evaluation.reference_data import check_classes, data_rule, reference_sets
    from latentdiff.models.codec import LatentCodec

    _, test = reference_sets(data, *data_rule(folder, LatentCodec(pipeline.vae)))
    check_classes(pipeline, test, data)
    rows = [(test.labels == k).nonzero()[:2, 0] for k in range(pipeline.num_classes)]
    if any(len(pair) < 2 for pair in rows):
        raise UserError(f"--data {data}: every class needs two held-out images to interpolate between")
    first, second = torch.stack(rows).T
    return test.batch(first)[0], test.batch(second)[0]
