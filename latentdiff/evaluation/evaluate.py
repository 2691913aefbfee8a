"""`latentdiff evaluate`: measure a model's images, or images that exist, against a data set, and write the results down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from latentdiff.errors import UserError
from latentdiff.evaluation import default_features
from latentdiff.utils import processes, progress_bars
from latentdiff.utils.deprecation import renamed

if TYPE_CHECKING:
    from latentdiff.data.datasets import ImageDataset
    from latentdiff.generation import Subject
    from latentdiff.models.codec import LatentCodec

BATCH = 250  # images in a batch of the feature network
CURVE_IMAGES = 1000  # most images of each guidance scale, where --curve-images is not given


class _Request(NamedTuple):
    """What to generate: `each` images of each subject."""

    subjects: list[Subject]
    each: int
    classes: list[int] | None  # of each subject, where subjects are prompts and the model has classes too
    labels: np.ndarray | None  # the class of each image, [N]
    prompt_facts: dict[str, Any]  # on prompts, for the protocol; empty for a model that reads no text
    given: Any = None  # gives a batch its second images, as of `generate_batches`; None for a model without

    @property
    def total(self) -> int:
        return len(self.subjects) * self.each


class _Images(NamedTuple):
    """The images to measure, the real ones to compare them with, and how they were made."""

    sets: list[np.ndarray]  # one for each seed, uint8 [N, H, W, C]
    labels: np.ndarray | None  # of each set, [N]
    train: ImageDataset
    test: ImageDataset
    protocol: dict[str, Any]
    made: dict[str, Any]
    codec: LatentCodec | None = None
    guided: tuple[dict[float, np.ndarray], np.ndarray | None] | None = None  # {guidance scale: images}, their labels
    prompts: Sequence[str] = ()


@renamed(num_inference_steps="steps", guidance_scale="guidance")
def evaluate(
    model: str | Path | None,
    data: str,
    num_images: int = 5000,
    samples: str | Path | None = None,
    features: str | Path | None = None,
    out: str | Path | None = None,
    cas_seeds: int = 1,
    device: str = "auto",
    seeds: int = 1,
    reference_cache: str | Path | None = None,
    guidance_curve: Sequence[float] = (),
    curve_images: int | None = None,
    bits_images: int = 0,
    prompts: str | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    precision: str = "float32",
    seed: int = 0,
    batch_size: int = 128,
) -> dict[str, Any] | None:
    """Generate images, or read them, and measure them against a data set.

    A model of classes draws as many images of each class. A model that reads text draws captions of the data, each under
    its image's class where the model takes classes too. The report holds the Fréchet distance in the feature network's
    space with its floor (as many real images) and that of reconstructions, label accuracy, the classification accuracy score
    (CAS), what `latentdiff.evaluation.feature_metrics` measures, and the protocol.

    A model that is given a second image gets those of held-out images, and draws each under its image's class and caption.

    Args:
        model: a checkpoint: a folder or a Hub name. None where `samples` are measured.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards.
        num_images: images to draw, the same number of each class; or of captions.
        samples: measure an .npz file or a folder of images instead of a model.
        features: the network whose features are compared: a feature network's folder, a vision encoder's folder or Hub name, or
            the file of Inception's weights. By default one that ships: weights/rgb-features for colour images,
            weights/fashion-mnist-features for grey ones.
        out: a folder for evaluation.json and evaluation.md, the record metrics.json and the page index.html.
        cas_seeds: classifiers on each side of CAS; 0 leaves it out. They train on the CPU.
        device: of the model and the feature network: auto, cpu, cuda, cuda:1, mps or another of torch's names.
        seeds: sets of images, of seed, seed + 1 and so on. Values are means over them.
        reference_cache: a folder that keeps features of the data. By default reference-cache beside `out`.
        guidance_curve: guidance scales at which `curve_images` more are drawn and measured.
        curve_images: images for each scale. By default num_images, but at most 1000, rounded down to whole classes.
        bits_images: held-out images whose bits per dimension are bounded too, each under its own class (of a model that
            reads text, under the empty prompt); some 1 s an image.
        prompts: whose captions a model that reads text draws, and whose second images a model is given: test or train. By
            default test, the held-out images.
        steps: steps of the sampler. By default the checkpoint's, or more where the sampler needs more.
        sampler: one of latentdiff's samplers (latentdiff.samplers.names()). By default the checkpoint's own scheduler.
        guidance: scale of classifier-free guidance; 1 is off. By default the checkpoint's.
        guidance_interval: guide only at times t from LOW to HIGH, where 0 is data and 1 is noise; 0 1 is everywhere. By
            default the checkpoint's.
        precision: of the U-Net: float32 or bfloat16.
        seed: an image depends on the seed, its class or prompt and its number, not on the batch size.
        batch_size: images made at a time.

    Returns:
        The report. Several processes of a launcher share the generating and the features of the data; the first one
        measures, and the others return None.

    Raises:
        UserError: arguments that do not go together, or a model, data, samples or features that cannot be used.
    """
    from latentdiff.evaluation import metrics
    from latentdiff.evaluation.feature_cache import reference_statistics
    from latentdiff.evaluation.feature_spaces import open_features
    from latentdiff.evaluation.feature_training import train_classifier
    from latentdiff.evaluation.measure_likelihood import measure_likelihood
    from latentdiff.evaluation.sample_sets import without_padding

    # 1. Refuse arguments that do not go together, before anything is loaded
    reference_cache = _check(model, samples, (num_images, batch_size, seeds, cas_seeds), out, reference_cache)
    _check_further(model, guidance_curve, curve_images, bits_images, prompts)
    started = time.perf_counter()

    # 2. The images: drawn by the model, or read
    net = None if features is None else open_features(features)
    if model is not None:
        net = net or open_features(default_features(_channels(model)))
        call = {
            "num_inference_steps": steps,
            "sampler": sampler,
            "guidance_scale": guidance,
            "guidance_interval": guidance_interval,
            "batch_size": batch_size,
        }
        numbers = num_images, seeds, curve_images, bits_images
        images = _generate(model, data, numbers, seed, guidance_curve, prompts, device, precision, call)
    else:
        channels = None if net is None else net.channels
        images = _read(samples, data, channels, device) if processes.rank() == 0 else None  # nothing of these is shared
    if images is None:
        return None
    net = net or open_features(default_features(images.train.preprocess.channels or 3))
    generated = time.perf_counter()

    # 3. The features of the training images. Several processes share the work; only the first one goes on
    net = net.to(images.made["device"])
    train = without_padding(images.train)
    reference = reference_statistics(net, train, BATCH, reference_cache, metrics.say, model is not None)
    if reference is None:
        return None

    # 4. All metrics of the images, beside their floors, and the bound on the likelihood if it was requested
    report = metrics.evaluate_samples(
        images.sets[0],
        images.labels,
        images.train,
        images.test,
        net,
        protocol=images.protocol,
        codec=images.codec,
        more=images.sets[1:],
        train_classifier=train_classifier if cas_seeds else None,
        cas_seeds=range(cas_seeds),
        reference=reference,
        guided=images.guided,
        batch=BATCH,
    )
    if bits_images and model is not None:
        report["likelihood"] = measure_likelihood(model, data, bits_images, seed=seed, device=device)

    # 5. Name what was not measured, and write the report
    left_out = {
        "cas": None if cas_seeds else "--cas-seeds 0",
        "guidance_curve": None if guidance_curve else "without --guidance-curve",
        "bits_per_dim": None if bits_images else "without --bits-images",
    }
    report["left_out"] |= {name: reason for name, reason in left_out.items() if reason}
    if out is not None:
        seconds = {"loading_and_generating": generated - started, "measuring": time.perf_counter() - generated}
        _write(out, report, images, seconds)
    return report


def _channels(model: str | Path) -> int:
    """The image channels of a checkpoint, as its autoencoder says; 3 where that says nothing."""
    from latentdiff.checkpoints import resolve_model

    try:
        config = json.loads((resolve_model(model) / "vae" / "config.json").read_text(encoding="utf-8"))
        return int(config.get("in_channels", 3))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return 3  # loading it will say what is wrong


def _read(samples: str | Path | None, data: str, channels: int | None, device: str) -> _Images:
    """Images of a file or a folder, and the data set as it is; channels: None for those that the data have."""
    from latentdiff.data.transforms import Preprocess
    from latentdiff.evaluation.reference_data import reference_sets
    from latentdiff.evaluation.sample_sets import read_folder, read_npz, sample_set, without_padding

    chosen = processes.pick_device(device)
    from_npz = None if Path(str(samples)).is_dir() else read_npz(samples)
    train, test = reference_sets(data, Preprocess(channels=channels))
    images, labels = from_npz or read_folder(str(samples), train.class_names)
    sample_set(images, labels, without_padding(train))  # refuses what does not go together, before anything is measured
    _check_floor(test, labels, len(images))
    return _Images([images], labels, train, test, {"model": f"samples of {samples}"}, {"device": str(chosen)})


def _generate(
    model: str | Path,
    data: str,
    counts: tuple[int, int, int | None, int],
    seed: int,
    scales: Sequence[float],
    prompts: str | None,
    device: str,
    precision: str,
    call: dict[str, Any],
) -> _Images:
    """A model's images. Each process generates its share; the first one alone then has the images."""
    from latentdiff.checkpoints import load, resolve_model, weights_of
    from latentdiff.evaluation.measure_likelihood import check_likelihood
    from latentdiff.evaluation.records import sampling_protocol
    from latentdiff.evaluation.reference_data import check_classes, data_rule, reference_sets
    from latentdiff.generation import place, set_precision
    from latentdiff.models.codec import LatentCodec

    # The model and its data
    folder, (num_images, seeds, curve_images, bits_images) = resolve_model(model), counts
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    chosen = place(pipeline, device, call["sampler"])
    set_precision(pipeline, precision)
    codec = LatentCodec(pipeline.vae)
    train, test = reference_sets(data, *data_rule(folder, codec))

    # Refuse what cannot be measured before anything is generated
    check_classes(pipeline, train, data)
    if scales and not _can_be_guided(pipeline):
        raise UserError(
            "--guidance-curve: this model has no guidance: it reads neither classes nor text, or was trained without dropout"
        )
    if bits_images:
        check_likelihood(pipeline, str(model))
    if prompts is not None and pipeline.text_encoder is None and getattr(pipeline.config, "image_condition", None) is None:
        raise UserError(f"--prompts {prompts}: this model reads no text; leave it out")
    part = prompts or "test"
    images = {"test": test, "train": train}[part]
    request = _request(pipeline, num_images, "--num-images", images, part, data)
    curve_count = _curve_images(pipeline, curve_images, num_images) if scales else num_images
    curve_request = _request(pipeline, curve_count, "--curve-images", images, part, data)
    _check_floor(test, request.labels, num_images)

    # Generate
    processes.announce("evaluate", chosen, num_images, call["batch_size"])
    sets = [_make(pipeline, request, seed=seed + k, **call) for k in range(seeds)]
    guided = {
        scale: _make(pipeline, curve_request, f"guidance {scale:g}", seed=seed, **call | {"guidance_scale": scale})
        for scale in scales
    }
    protocol = {**sampling_protocol(pipeline, str(model), seed=seed, **call), "precision": precision}
    if request.prompt_facts:
        protocol["prompts"] = request.prompt_facts
    return _Images(
        sets,
        request.labels,
        train,
        test,
        protocol,
        {**weights_of(folder), "device": str(chosen)},
        codec,
        (guided, curve_request.labels) if guided else None,
        [str(text) for text in request.subjects] if pipeline.text_encoder is not None else (),
    )


def _check_floor(test: ImageDataset, labels: np.ndarray | None, count: int) -> None:
    """UserError where there are no held-out images for the floor."""
    import torch

    from latentdiff.evaluation.sample_sets import matching_rows

    rows = matching_rows(test, None if labels is None else torch.as_tensor(labels), count, 0)
    if len(rows) < 2:
        raise UserError(f"--data: has {len(rows)} held-out images to compare with, and needs two; add a test/ folder")


def _can_be_guided(pipeline: Any) -> bool:
    """Whether a model has a condition, and was trained without it too."""
    classes, text, config = pipeline.num_classes > 0, pipeline.text_encoder is not None, pipeline.config
    if not (classes or text):
        return bool((getattr(config, "image_condition", None) or {}).get("dropped"))
    without_dropout = classes and config.null_class is None or text and config.null_prompt is None
    return not without_dropout


def _curve_images(pipeline: Any, requested: int | None, num_images: int) -> int:
    """Images of each guidance scale: what was requested, else num_images up to CURVE_IMAGES, a multiple of the classes."""
    if requested is not None:
        return requested
    balanced = pipeline.text_encoder is None and getattr(pipeline.config, "image_condition", None) is None
    classes = max(1, pipeline.num_classes) if balanced else 1
    return max(min(num_images, CURVE_IMAGES) // classes * classes, classes)


def _request(pipeline: Any, count: int, flag: str, images: ImageDataset, part: str, data: str) -> _Request:
    """`count` class-balanced images, or captions of `images`, which are that part of the data. flag: where count is from."""
    from latentdiff.evaluation.reference_data import check_classes
    from latentdiff.evaluation.sample_sets import draw_prompts
    from latentdiff.generation import every_class

    if getattr(pipeline.config, "image_condition", None) is not None:
        return _request_from_images(pipeline, count, images, part, data)
    if pipeline.text_encoder is not None:
        check_classes(pipeline, images, data)
        drawn = draw_prompts(images, count, part, data)
        if not pipeline.num_classes:
            return _Request([*drawn.texts], 1, None, None, drawn.facts)
        return _Request([*drawn.texts], 1, drawn.labels.tolist(), drawn.labels.numpy(), drawn.facts)
    rows = every_class(pipeline)
    if count % len(rows):
        raise UserError(f"{flag} {count}: must be a multiple of the model's {len(rows)} classes")
    each = count // len(rows)
    return _Request(rows, each, None, None if rows == [None] else np.repeat(np.asarray(rows), each), {})


def _request_from_images(pipeline: Any, count: int, images: ImageDataset, part: str, data: str) -> _Request:
    """`count` images, each made from the second image of one of `images`, and its class and caption where the model takes them.

    Which of `images` follows from their number and count alone: each once, then again with another draw of its mask.
    """
    from latentdiff.evaluation.reference_data import check_classes
    from latentdiff.evaluation.sample_sets import GivenImages

    check_classes(pipeline, images, data)
    given = GivenImages(images, getattr(pipeline.config, "image_condition", None), count, part)
    labels = None if images.labels is None else images.labels[given.rows]
    classes = labels.tolist() if labels is not None and pipeline.num_classes else None
    texts = given.captions(data) if pipeline.text_encoder is not None else None
    subjects: list[Subject] = [*(texts or classes or [None] * count)]
    return _Request(
        subjects,
        1,
        classes if texts else None,
        None if labels is None else labels.numpy(),
        given.facts,
        given,
    )


def _make(pipeline: Any, request: _Request, doing: str = "", seed: int = 0, batch_size: int = 128, **call: Any) -> Any:
    """The requested images, uint8 [N, H, W, C], on the first process; None on others."""
    from latentdiff.generation import generate_share

    part = processes.share(request.total, batch_size)
    doing = f"generating, {doing}" if doing else "generating"
    with progress_bars.bar(
        total=part.stop - part.start, unit="image", desc=doing, delay=0.5, disable=processes.rank() > 0
    ) as bar:
        call |= {"label": request.classes, "given": request.given}
        mine = generate_share(pipeline, request.subjects, request.each, seed, batch_size, bar.update, **call)
    return processes.gather(mine, request.total, batch_size)


def _check(
    model: str | Path | None,
    samples: str | Path | None,
    counts: tuple[int, int, int, int],
    out: str | Path | None,
    reference_cache: str | Path | None,
) -> str | Path | None:
    """UserError for arguments of `evaluate` that are out of range; returns the folder of the reference's features."""
    from latentdiff.evaluation.feature_cache import default_cache_folder
    from latentdiff.utils.outputs import check_out_folder

    num_images, batch_size, seeds, cas_seeds = counts
    if (model is None) == (samples is None):
        raise UserError("evaluate: give either MODEL or --samples, an .npz or a folder")
    if num_images < 2 or min(batch_size, seeds) < 1 or cas_seeds < 0:
        raise UserError("evaluate: --num-images must be at least 2, --batch-size, --seeds at least 1, --cas-seeds at least 0")
    if samples is not None and seeds != 1:
        raise UserError(f"--seeds {seeds}: --samples are of one seed; give MODEL to make images from several")
    for folder, flag in ((out, "--out"), (reference_cache, "--reference-cache")):
        if folder is not None:
            check_out_folder(folder, flag)
    return default_cache_folder(out) if reference_cache is None and out is not None else reference_cache


def _check_further(
    model: str | Path | None, scales: Sequence[float], curve_images: int | None, bits_images: int, prompts: str | None
) -> None:
    """UserError for wrong prompts, guidance scales or bits, and where they are given with samples that exist."""
    if prompts not in (None, "test", "train"):
        raise UserError(f"--prompts {prompts}: valid are test and train")
    given = {"--prompts": prompts, "--guidance-curve": scales, "--bits-images": bits_images}
    for flag, value in given.items():
        if model is None and value:
            raise UserError(
                f"{flag} cannot be combined with --samples: those images already exist. Give MODEL, or drop {flag}."
            )
    wrong = [scale for scale in scales if not 0 <= scale < float("inf")]
    if wrong or len(set(scales)) < len(scales):
        raise UserError(f"--guidance-curve {' '.join(f'{s:g}' for s in scales)}: give different numbers, 0 or more; 1 is off")
    if (curve_images is not None and curve_images < 2) or bits_images < 0:
        raise UserError("evaluate: --curve-images must be at least 2, --bits-images at least 0")


def _write(out: str | Path, report: dict[str, Any], images: _Images, seconds: dict[str, float]) -> None:
    from latentdiff.evaluation import html_report, markdown_report, records

    record = records.make_record(report, images.made, seconds)
    markdown_report.write_report(report, out)
    html_report.write_page(record, out, images.sets[0], images.labels, images.train, images.prompts)
    records.write_record(record, out)
