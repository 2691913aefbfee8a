"""`latentdiff evaluate`: images of a model, or images that are there, measured against a data set and written down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from latentdiff.errors import UserError
from latentdiff.evaluation import DEFAULT_FEATURES
from latentdiff.evaluation.feature_spaces import open_features
from latentdiff.evaluation.measure_likelihood import check_likelihood
from latentdiff.evaluation.measure_likelihood import measure_likelihood as likelihood
from latentdiff.evaluation.records import sampling_protocol
from latentdiff.evaluation.reference_data import check_classes, data_rule
from latentdiff.evaluation.sample_sets import read_npz
from latentdiff.utils import processes
from latentdiff.utils.deprecation import renamed

if TYPE_CHECKING:
    from latentdiff.data.datasets import ImageDataset
    from latentdiff.generation import Subject
    from latentdiff.models.codec import LatentCodec


BATCH = 250  # images that a feature network sees at a time
CURVE_IMAGES = 1000  # at most, of each guidance scale, where nothing is said


class _Drawn(NamedTuple):
    """Images to be measured: sets of uint8 [N, H, W, C] with labels [N] or None, real ones, and how they were made."""

    sets: list[np.ndarray]
    labels: np.ndarray | None
    train: ImageDataset
    test: ImageDataset
    protocol: dict[str, Any]
    made: dict[str, Any]
    codec: LatentCodec | None = None
    curve: tuple[dict[float, np.ndarray], np.ndarray | None] | None = None
    prompts: Sequence[str] = ()


class _Wanted(NamedTuple):
    """What is drawn: `each` images of each subject; the classes of prompts, those of all images [N], and facts on prompts."""

    subjects: list[Subject]
    each: int
    beside: list[int] | None
    labels: np.ndarray | None
    prompts: dict[str, Any]

    @property
    def total(self) -> int:
        return len(self.subjects) * self.each


@renamed(num_inference_steps="steps", guidance_scale="guidance")
def evaluate(
    model: str | Path | None,
    data: str,
    num_images: int = 5000,
    samples: str | Path | None = None,
    features: str | Path = DEFAULT_FEATURES,
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

    Args:
        model: a checkpoint: a folder or a Hub name. None where `samples` are measured.
        data: a data set: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards.
        num_images: images to draw, the same number of each class; or of captions.
        samples: measure an .npz file or a folder of images instead of a model.
        features: the network whose features are compared: a feature network's folder, a vision encoder's folder or Hub name, or
            the file of Inception's weights.
        out: a folder for evaluation.json and evaluation.md, the record metrics.json and the page index.html.
        cas_seeds: classifiers on each side of CAS; 0 leaves it out. They train on the CPU.
        device: of the model and the feature network: auto, cpu, cuda, cuda:1, mps or another of torch's names.
        seeds: sets of images, of seed, seed + 1 and so on. Values are means over them.
        reference_cache: a folder that keeps features of the data. By default reference-cache beside `out`.
        guidance_curve: guidance scales at which `curve_images` more are drawn and measured.
        curve_images: images for each scale. By default num_images, but at most 1000, rounded down to whole classes.
        bits_images: held-out images whose bits per dimension are bounded too, each under its own class (of a model that
            reads text, under the empty prompt); some 1 s an image.
        prompts: whose captions a model that reads text draws: test or train. By default test, the held-out images.
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
    from latentdiff.evaluation.feature_training import train_classifier
    from latentdiff.evaluation.sample_sets import without_padding

    call = {
        "num_inference_steps": steps,
        "sampler": sampler,
        "guidance_scale": guidance,
        "guidance_interval": guidance_interval,
        "precision": precision,
        "batch_size": batch_size,
    }
    counts = num_images, batch_size, seeds, cas_seeds
    reference_cache = _check(model, samples, counts, out, reference_cache)
    _check_further(model, guidance_curve, curve_images, bits_images, prompts)
    started = time.perf_counter()
    net = open_features(features)
    if model is None:
        drawn = None if processes.rank() > 0 else _there(samples, data, net.channels, device)  # nothing is shared of these
    else:
        numbers = num_images, seeds, curve_images, bits_images
        drawn = _draw(model, data, numbers, seed, guidance_curve, prompts, device, call)
    if drawn is None:
        return None
    generated, net = time.perf_counter(), net.to(drawn.made["device"])
    reference = reference_statistics(net, without_padding(drawn.train), BATCH, reference_cache, metrics.say, model is not None)
    if reference is None:
        return None
    report = metrics.evaluate_samples(
        drawn.sets[0],
        drawn.labels,
        drawn.train,
        drawn.test,
        net,
        protocol=drawn.protocol,
        codec=drawn.codec,
        more=drawn.sets[1:],
        train_classifier=train_classifier if cas_seeds else None,
        cas_seeds=range(cas_seeds),
        reference=reference,
        guided=drawn.curve,
        batch=BATCH,
    )
    if bits_images and model is not None:
        report["likelihood"] = likelihood(model, data, bits_images, seed=seed)
    asked = {"cas": cas_seeds, "guidance_curve": guidance_curve, "bits_per_dim": bits_images}
    flags = {"cas": "--cas-seeds 0", "guidance_curve": "without --guidance-curve", "bits_per_dim": "without --bits-images"}
    report["left_out"] |= {name: flag for name, flag in flags.items() if not asked[name]}
    if out is not None:
        seconds = {"loading_and_generating": generated - started, "measuring": time.perf_counter() - generated}
        _write(out, report, drawn, seconds)
    return report


def _there(samples: str | Path | None, data: str, channels: int, device: str) -> _Drawn:
    """Images that are in a file or a folder, beside the data set as it is."""
    from latentdiff.data.transforms import Preprocess
    from latentdiff.evaluation.reference_data import reference_sets
    from latentdiff.evaluation.sample_sets import read_folder, sample_set, without_padding

    found = processes.pick_device(device)
    there = None if Path(str(samples)).is_dir() else read_npz(samples)
    train, test = reference_sets(data, Preprocess(channels=channels))
    images, labels = there or read_folder(str(samples), train.class_names)
    sample_set(images, labels, without_padding(train))  # what does not go together is said before anything is looked at
    _check_floor(test, labels, len(images))
    return _Drawn([images], labels, train, test, {"model": f"samples of {samples}"}, {"device": str(found)})


def _draw(model, data, counts, seed, scales, prompts, device, call) -> _Drawn:
    """What a model draws, its share on each process; the first one alone then has the images."""
    from latentdiff.checkpoints import load, resolve_model, weights_of
    from latentdiff.evaluation.reference_data import reference_sets
    from latentdiff.generation import place, set_precision
    from latentdiff.models.codec import LatentCodec

    folder, (num_images, seeds, curve_images, bits_images) = resolve_model(model), counts
    pipeline = load(folder)
    pipeline.set_progress_bar_config(disable=True)
    precision = call.pop("precision", "float32")
    found = place(pipeline, device, call.get("sampler"))
    set_precision(pipeline, precision)
    codec = LatentCodec(pipeline.vae)
    train, test = reference_sets(data, *data_rule(folder, codec))
    check_classes(pipeline, train, data)
    if scales and not _can_be_guided(pipeline):
        raise UserError("--guidance-curve: this model has no guidance: it is told nothing, or was trained without dropout")
    if bits_images:
        check_likelihood(pipeline, str(model))  # now, and not when all else is done
    if prompts is not None and pipeline.text_encoder is None:
        raise UserError(f"--prompts {prompts}: this model reads no text; leave it out")
    part = prompts or "test"
    images = {"test": test, "train": train}[part]
    wanted = _wanted(pipeline, num_images, "--num-images", images, part, data)
    fewer = _curve_images(pipeline, curve_images, num_images) if scales else num_images
    few = _wanted(pipeline, fewer, "--curve-images", images, part, data)
    _check_floor(test, wanted.labels, num_images)
    processes.announce("evaluate", found, num_images, call.get("batch_size", 128))
    sets = [_make(pipeline, wanted, seed=seed + k, **call) for k in range(seeds)]
    guided = {s: _make(pipeline, few, f"guidance {s:g}", seed=seed, **call | {"guidance_scale": s}) for s in scales}
    protocol = {**sampling_protocol(pipeline, str(model), seed=seed, **call), "precision": precision}
    if wanted.prompts:
        protocol["prompts"] = wanted.prompts
    made = {**weights_of(folder), "device": str(found)}
    texts = [str(text) for text in wanted.subjects] if wanted.prompts else ()
    curve = (guided, few.labels) if guided else None
    return _Drawn(sets, wanted.labels, train, test, protocol, made, codec, curve, texts)


def _check_floor(test: ImageDataset, labels: np.ndarray | None, count: int) -> None:
    """UserError, before anything is generated, where there are no held-out images to take the floor from."""
    import torch

    from latentdiff.evaluation.sample_sets import matching_rows

    rows = matching_rows(test, None if labels is None else torch.as_tensor(labels), count, 0)
    if len(rows) < 2:
        raise UserError(f"--data: has {len(rows)} held-out images to compare with, and needs two; add a test/ folder")


def _can_be_guided(pipeline) -> bool:
    """Whether a model is told something, and was trained without it too."""
    classed, texted, config = pipeline.num_classes > 0, pipeline.text_encoder is not None, pipeline.config
    unlearnt = classed and config.null_class is None or texted and config.null_prompt is None
    return (classed or texted) and not unlearnt


def _curve_images(pipeline, asked: int | None, num_images: int) -> int:
    if asked is not None:
        return asked
    classes = 1 if pipeline.text_encoder is not None else max(1, pipeline.num_classes)
    return max(min(num_images, CURVE_IMAGES) // classes * classes, classes)


def _wanted(pipeline, count: int, flag: str, images: ImageDataset, part: str, data: str) -> _Wanted:
    """Class-balanced images, or captions of `images`, the part of the data of that name."""
    from latentdiff.evaluation.sample_sets import draw_prompts
    from latentdiff.generation import every_class

    if pipeline.text_encoder is not None:
        check_classes(pipeline, images, data)
        found = draw_prompts(images, count, part, data)
        classes = found.labels if pipeline.num_classes else None
        beside, labels = (None, None) if classes is None else (classes.tolist(), classes.numpy())
        return _Wanted([*found.texts], 1, beside, labels, found.facts)
    rows = every_class(pipeline)
    if count % len(rows):
        raise UserError(f"{flag} {count}: must be a multiple of the model's {len(rows)} classes")
    each = count // len(rows)
    return _Wanted(rows, each, None, None if rows == [None] else np.repeat(np.asarray(rows), each), {})


def _make(pipeline, wanted: _Wanted, doing: str = "", seed: int = 0, batch_size: int = 128, **call) -> Any:
    """What is wanted, uint8 [N, H, W, C], on the first process; None on others."""
    from tqdm import tqdm

    from latentdiff.generation import generate_share

    part, hidden = processes.share(wanted.total, batch_size), processes.rank() > 0
    doing = ", ".join(filter(None, ("generating", doing)))
    with tqdm(total=part.stop - part.start, unit="image", desc=doing, delay=0.5, disable=hidden) as bar:
        call["label"] = wanted.beside
        mine = generate_share(pipeline, wanted.subjects, wanted.each, seed, batch_size, bar.update, **call)
    return processes.gather(mine, wanted.total, batch_size)


def _check(model, samples, counts, out, reference_cache) -> str | Path | None:
    """UserError for arguments of `evaluate` that mean nothing; returns where the reference is kept."""
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


def _check_further(model, scales: Sequence[float], curve_images: int | None, bits_images: int, prompts: str | None) -> None:
    if prompts not in (None, "test", "train"):
        raise UserError(f"--prompts {prompts}: valid are test and train")
    if model is None and prompts is not None:
        raise UserError("--prompts: of a MODEL; --samples are made")
    if model is None and (scales or bits_images):
        raise UserError(f"{'--guidance-curve' if scales else '--bits-images'}: of a MODEL; --samples have none")
    wrong = [scale for scale in scales if not 0 <= scale < float("inf")]
    if wrong or len(set(scales)) < len(scales):
        raise UserError(f"--guidance-curve {' '.join(f'{s:g}' for s in scales)}: give different numbers, 0 or more; 1 is off")
    if (curve_images is not None and curve_images < 2) or bits_images < 0:
        raise UserError("evaluate: --curve-images must be at least 2, --bits-images at least 0")


def _write(out: str | Path, report: dict[str, Any], drawn: _Drawn, seconds: dict[str, float]) -> None:
    from latentdiff.evaluation import html_report, records
    from latentdiff.evaluation.markdown_report import write_report

    record = records.make_record(report, drawn.made, seconds)
    write_report(report, out)
    html_report.write_page(record, out, drawn.sets[0], drawn.labels, drawn.train, drawn.prompts)
    records.write_record(record, out)
