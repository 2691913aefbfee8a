"""The evaluation of generated images: every number beside its floor and with the protocol that made it.

A distance alone says little: it depends on the number of images, the reference, the classes drawn and the network.
So a report holds all of these, what real held-out images score at the same N (the floor), and what the autoencoder's
own reconstructions of them score, below which no denoiser in its latent space can be expected to go.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.datasets import ImageDataset
from latentdiff.errors import UserError
from latentdiff.evaluation import guidance_curve
from latentdiff.evaluation.classification import ClassifierTrainer, cas, class_counts
from latentdiff.evaluation.feature_metrics import FeatureMetrics, mean_over_seeds, settings
from latentdiff.evaluation.feature_statistics import FeatureStatistics, feature_statistics, read_batches
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.image_quality import psnr, ssim
from latentdiff.evaluation.sample_sets import matching_rows, sample_set, subset, without_padding
from latentdiff.models.codec import LatentCodec
from latentdiff.models.feature_net import FeatureSpace

# What a reader needs to repeat a number; what the caller cannot tell stays null and is shown as "not stated".
PROTOCOL_FIELDS = ("model", "sampler", "steps", "guidance", "seed")


def say(line: str) -> None:
    print(line, file=sys.stderr)


def evaluate_samples(
    samples: np.ndarray,
    labels: np.ndarray | None,
    train: ImageDataset,
    test: ImageDataset,
    net: FeatureSpace,
    *,
    protocol: Mapping[str, Any] | None = None,
    codec: LatentCodec | None = None,
    train_classifier: ClassifierTrainer | None = None,
    cas_seeds: Sequence[int] = (0,),
    draw_seed: int = 0,
    batch: int = 250,
    more: Sequence[np.ndarray] = (),
    reference: FeatureStatistics | None = None,
    guided: tuple[Mapping[float, np.ndarray], np.ndarray | None] | None = None,
    log: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Measure generated images against real ones; the report as JSON values.

    The reference of every Fréchet distance is the whole of train. The floor is the same distance of N real test
    images with the samples' class counts (fewer where test has fewer: the report says how many), and the
    reconstruction that of these images through codec. All are compared without padding, in 8 bits. Images are read
    batch by batch; what grows with their number is the samples, and one float32 feature vector for each image.
    "distribution": what `latentdiff.evaluation.feature_metrics` takes from these features; "per_class" and "memorisation" too.

    Args:
        samples: uint8 [N, H, W, C]; grey samples may come as RGB, as `generate` writes them.
        labels: int64 [N], indices into train.class_names; None: unconditional samples, no label accuracy, no CAS.
        protocol: how the samples were made: model, sampler, steps, guidance, seed, and whatever else is to stand there.
        codec: the first stage, for the reconstruction row.
        train_classifier: trains a classifier from (data set, seed), for CAS; None leaves CAS out.
        draw_seed: which real images make the floor and CAS's real side, and subsets of images.
        more: further sets like samples, from other seeds: values are then means over all sets, with their spread; CAS,
            per_class, memorisation and samples_sha256 are of the first alone.
        reference: what net sees in train without padding, features kept, where that is known (`reference_statistics`).
        guided: ({guidance scale: samples}, their labels), for "guidance_curve".

    Raises:
        UserError: samples, labels and data do not go together; the message says how.
    """
    train_content, test_content = without_padding(train), without_padding(test)
    sets = [sample_set(each, labels, train_content) for each in (samples, *more)]
    generated = sets[0]
    if any(len(each) != len(generated) for each in sets):
        raise UserError(f"sets of samples from several seeds must be equally large, got {[len(each) for each in sets]}")
    floor_rows = matching_rows(test, generated.labels, len(generated), draw_seed)
    held_out_images = subset(test_content, floor_rows)
    log(f"evaluate: features of {len(train)} reference images, {len(generated)} samples, {len(floor_rows)} test images")
    if len(floor_rows) < min(len(generated), 2 * net.dim):
        few = f"{len(floor_rows)} held-out images beside {len(generated)} samples, for {net.dim} features"
        log(f"warning: the floor is of {few}: it is high for their number alone, so values under it say nothing")
    reference = reference or feature_statistics(net, read_batches(train_content, batch), keep=True)
    seen = [feature_statistics(net, read_batches(each, batch, "features of samples"), keep=True) for each in sets]
    floor = feature_statistics(net, read_batches(held_out_images, batch, "features of test images"), keep=True)
    metrics = mean_over_seeds([_metrics(net, train, reference, each, floor, log) for each in seen])
    frechet = metrics[f"frechet[{net.name}]"]
    if train_classifier is not None and generated.labels is not None:
        log(f"evaluate: training {2 * len(cas_seeds)} classifiers for CAS")
        metrics["cas"] = _cas(train_classifier, generated, train_content, test_content, cas_seeds, draw_seed)
    around = FeatureMetrics(net.name, reference, floor, train_content, held_out_images, draw_seed, log)
    report: dict[str, Any] = {
        "protocol": _protocol(protocol, generated, seen[0], draw_seed, len(sets)),
        "reference": _reference(train, reference, net) | {"held_out_sha256": floor.sha256, "held_out_images": len(floor_rows)},
        "metrics": metrics,
        "distribution": mean_over_seeds([around.distribution(*each) for each in zip(seen, sets, strict=True)]),
        "memorisation": around.memorisation(seen[0], generated),
        "settings": settings(generated.preprocess.channels or 1, generated.preprocess.content[2:]),
        "left_out": around.left_out,
    }
    if guided is not None:
        report["guidance_curve"] = guidance_curve.guidance_curve(net, reference, train, test, *guided, draw_seed, batch, log)
    classes = around.per_class(seen[0], generated, f"label_accuracy[{net.name}]" in metrics)
    if classes is not None:
        report["per_class"] = classes
    if codec is not None:
        log(f"evaluate: reconstructing {len(floor_rows)} test images")
        report["reconstruction"] = _reconstruction(net, codec, subset(test, floor_rows), batch)
        moments = report["reconstruction"].pop("moments")
        frechet["reconstruction"] = frechet_distance(moments, reference.moments)
    return report


def _metrics(
    net: FeatureSpace,
    train: ImageDataset,
    reference: FeatureStatistics,
    seen: FeatureStatistics,
    floor: FeatureStatistics,
    log: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """The Fréchet distance and the label accuracy."""
    frechet: dict[str, Any] = {
        "value": frechet_distance(seen.moments, reference.moments),
        "floor": frechet_distance(floor.moments, reference.moments),
        "images": seen.moments.count,
        "floor_images": floor.moments.count,
    }
    metrics: dict[str, Any] = {f"frechet[{net.name}]": frechet}
    if seen.accuracy is not None and net.info.get("class_names") == list(train.class_names):
        metrics[f"label_accuracy[{net.name}]"] = {
            "value": seen.accuracy,
            "real": floor.accuracy,
            "images": seen.moments.count,
            "real_images": floor.moments.count,
        }
    elif seen.accuracy is not None:
        log(f"evaluate: no label accuracy: {net.name!r} was not trained on the classes of data '{train.source.name}'")
    return metrics


def _cas(
    train_classifier: ClassifierTrainer,
    generated: ImageDataset,
    train: ImageDataset,
    test: ImageDataset,
    seeds: Sequence[int],
    draw_seed: int,
) -> dict[str, Any]:
    """CAS beside that of as many real images; both sides shrink alike where train has too few of a class."""
    real = subset(train, matching_rows(train, generated.labels, len(generated), draw_seed))
    generated = subset(generated, matching_rows(generated, real.labels, len(real), draw_seed))
    score = cas(train_classifier, generated, real, test, seeds)
    return {
        "value": score.value,
        "real": score.real_value,
        "ratio": score.ratio,
        "images": len(real),
        "seeds": list(seeds),
        "values": list(score.generated),
        "real_values": list(score.real),
    }


def _reconstruction(net: FeatureSpace, codec: LatentCodec, images: ImageDataset, batch: int) -> dict[str, Any]:
    """Feature moments, PSNR in dB and SSIM of images decoded from their posterior mean, in 8 bits, without padding."""
    errors: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
    crop = images.preprocess.crop_content

    def decoded() -> Iterator[tuple[Tensor, None]]:
        for x, _ in read_batches(images, batch, "reconstructing"):
            y = codec.decode(codec.normalise(codec.moments(x)[0])).cpu()
            levels = ((y.clamp(-1, 1) + 1) * 127.5).round()  # what an image file can hold
            y, x = crop(levels / 127.5 - 1), crop(x)
            errors["psnr"].append(psnr(y, x))
            errors["ssim"].append(ssim(y, x))
            yield y, None

    moments = feature_statistics(net, decoded()).moments
    means = {name: torch.cat(parts).mean().item() for name, parts in errors.items()}
    return {"moments": moments, "images": len(images), **means, "autoencoder_sha256": codec.fingerprint()}


def _protocol(
    stated: Mapping[str, Any] | None, generated: ImageDataset, seen: FeatureStatistics, draw_seed: int, seeds: int
) -> dict[str, Any]:
    record: dict[str, Any] = {field: None for field in PROTOCOL_FIELDS} | dict(stated or {})
    record |= {"images": len(generated), "image_size": list(generated.preprocess.size or ())}
    record |= {"samples_sha256": seen.sha256, "draw_seed": draw_seed, "seeds": seeds}
    if generated.labels is not None:
        counts = class_counts(generated)
        record |= {"class_counts": counts, "class_balanced": len(set(counts)) == 1}
    return record


def _reference(train: ImageDataset, seen: FeatureStatistics, net: FeatureSpace) -> dict[str, Any]:
    return {
        "data": train.source.name,
        "images": len(train),
        "sha256": seen.sha256,
        "preprocessing": train.preprocess.describe(),
        "class_names": list(train.class_names),
        "features": net.name,
        "features_sha256": net.fingerprint(),
        "features_accuracy": net.info.get("test_accuracy"),
    }
